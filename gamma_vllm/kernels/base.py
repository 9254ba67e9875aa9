"""What a kernel offers, and what kernels share: layers of several segments, and custom operators for torch.compile."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gamma_vllm.shards import Segment

__all__ = [
    "Activation",
    "Kernel",
    "OneByOne",
    "Place",
    "Stack",
    "check_columns",
    "define",
    "kinds_of",
    "multiply_in_turn",
    "split_kinds",
    "tensors_of",
]


@dataclass(frozen=True)
class Place:
    """Where a tensor of one segment lies in the 1-D tensor that holds those of all experts: offset in elements."""

    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """One of the two weights (w13, w2) of a layer's experts.

    segments: of each local expert. tensors: by the names of `Kernel.tensor_names`, and `weight` at 16 bits, 1-D,
    those of all experts. places: by expert, number of the segment, and name. index: what `Kernel.index_experts` gave.
    """

    segments: Sequence[Sequence[Segment]]
    tensors: dict[str, Tensor]
    places: dict[tuple[int, int, str], Place]
    index: Any = None

    def of(self, expert: int, number: int, name: str) -> Tensor:
        place = self.places[expert, number, name]
        return self.tensors[name].narrow(0, place.offset, math.prod(place.shape)).view(place.shape)


class Activation(NamedTuple):
    """Of experts. `apply`: `[n, rows of w13]` to `[n, columns of w2]`, row by row. silu: it is silu(gate) * up, which a
    kernel may do itself."""

    apply: Callable[[Tensor], Tensor]
    silu: bool


class Kernel(Protocol):
    """What a kernel offers. `signature` changes with everything that changes the compiled graph."""

    @property
    def name(self) -> str: ...

    @property
    def buffers(self) -> tuple[str, ...]:
        """Which of the tensors are work space. vLLM's sleep keeps buffers and discards parameters."""

    @property
    def signature(self) -> str: ...

    @property
    def about(self) -> str:
        """What the log says of it beside its name; may be empty."""

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Why the kernel cannot run on `device`, or None."""

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        """The tensors that `pack` gives and `linear` takes: `packed`, `scale` and `zero_point`, as in the checkpoint
        `weight_packed`, `weight_scale` and `weight_zero_point`, where they are apart. None is called `weight`: that is
        the one of 16 bits, and experts of all widths keep tensors of one name together."""

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Once after loading: `packed`, `scale` and, if asymmetric, `zero_point` to what the kernel reads."""

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """`x` `[..., columns]` times the segment: `[..., rows]`, in the dtype of `x`."""

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        """`x` times all segments of a layer, joined: a new tensor `[..., sum of rows]`, in the dtype of `x`.

        A segment of 16 bits has one tensor, `weight`.
        """

    def index_experts(self, stack: Stack) -> Any:
        """Once after loading: what `experts` has to know of a stack; None where it cannot multiply it."""

    def experts(
        self, w13: Stack, w2: Stack, x: Tensor, ids: Tensor, weights: Tensor, activation: Activation
    ) -> Tensor | None:
        """All experts at once: `x` `[tokens, hidden_size]` to each token's sum over its choices, in float32 in their
        order, `[tokens, hidden_size]` in the dtype of `x`. None where the kernel cannot: each is multiplied alone then.

        ids: `[tokens, choices]` numbers of local experts, -1 for those of other ranks; weights: the same in float32.
        """


class OneByOne:
    """For kernels that multiply one expert after the other."""

    def index_experts(self, stack: Stack) -> None:
        return None

    def experts(self, w13: Stack, w2: Stack, x: Tensor, ids: Tensor, weights: Tensor, activation: Activation) -> None:
        return None


def multiply_in_turn(
    kernel: Kernel, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor
) -> Tensor:
    """`Kernel.layer` one product after the other, for kernels without a call for whole layers."""
    outputs = [
        kernel.linear(segment, held, x) if segment.quantized else F.linear(x, held["weight"])
        for segment, held in zip(segments, tensors, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def check_columns(segments: Sequence[Segment], x: Tensor) -> None:
    """Raises ValueError when the activations `[..., columns]` are of another layer: operators read bare memory."""
    columns = segments[0].columns
    if x.shape[-1] != columns:
        raise ValueError(f"{x.shape[-1]} activations for a weight of {columns} columns")


def tensors_of(kernel: Kernel, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """A layer's tensors in the one list that an operator takes: of each segment `weight` at 16 bits, else what
    `kernel.tensor_names` names."""
    return [
        held[name]
        for segment, held in zip(segments, tensors, strict=True)
        for name in (kernel.tensor_names(segment) if segment.quantized else ("weight",))
    ]


def kinds_of(segments: Sequence[Segment]) -> list[int]:
    """The numbers that tell the tensors of `tensors_of` apart: of each segment rows, group size (0 at 16 bits), bits,
    and 1 if symmetric."""
    return [n for s in segments for n in (s.rows, s.group_size or 0, s.num_bits, int(bool(s.symmetric)))]


def split_kinds(kinds: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """The numbers of `kinds_of`, segment by segment."""
    return zip(*[iter(kinds)] * 4, strict=True)


_LIBRARY = torch.library.Library("gamma", "FRAGMENT")


def define(
    name: str, schema: str, implementation: Callable[..., Tensor] | None, fake: Callable[..., Tensor] | None
) -> None:
    """Register operator `torch.ops.gamma.<name>`, opaque to torch.compile. Its implementation may come from
    elsewhere; without a `fake` it cannot be compiled; nothing happens when it is already there.

    `torch.ops.vllm` is shared by all plugins, where equal names collide; hence the namespace.
    """
    if hasattr(torch.ops.gamma, name):
        return
    _LIBRARY.define(name + schema)
    if implementation is not None:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"gamma::{name}", fake, lib=_LIBRARY)
