"""The processes that `torchrun` started: who does what, and how results come together in one order."""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "ProcessGroup", "process_group_from_environment"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class ProcessGroup:
    """One process's view of all of them; they share one file system. A group of one needs no torch.distributed."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files that all of them have in common."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """Number and value of those items that are this process's."""
        return [(i, item) for i, item in enumerate(items) if i % self.size == self.rank]

    def gather(self, mine: dict[int, Item]) -> list[Item]:
        """The results of all processes in the order of their numbers: the same list on each, for any group size."""
        parts: list[Any] = [None] * self.size
        if self.size == 1:
            parts = [mine]
        else:
            dist.all_gather_object(parts, mine)
        together = {number: item for part in parts for number, item in part.items()}
        return [together[number] for number in sorted(together)]

    def from_leader(self, compute: Callable[[], Item]) -> Item:
        """What `compute` returns on the first process, on each of them."""
        return self.gather({0: compute()} if self.leads else {})[0]

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes into `tensor`, on each of them."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process. Waits for all of them."""
        if self.size == 1:
            return flag
        return any(self.gather({self.rank: flag}))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = ProcessGroup()


def process_group_from_environment() -> ProcessGroup:
    """The process group that torchrun describes in WORLD_SIZE and RANK; `ALONE` without it.

    Tensors go over gloo on the CPU and nccl on CUDA, where each process of a machine takes the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not dist.is_initialized():
        atexit.register(dist.destroy_process_group)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return ProcessGroup(dist.get_rank(), dist.get_world_size())
