"""Serving straight from the bank: `vllm serve BANK --quantization gamma` with `GAMMA_MANIFEST=manifest.json`.

vLLM streams the tensors of the model's own files. On their way into the model the weights that the manifest stores
below 16 bits are replaced by the chosen candidates of the bank, so a new budget needs no second checkpoint on disk.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from allocator.contract.bank import BANK_NAME
from allocator.contract.errors import ContractError
from allocator.contract.expert_stacks import StackedMatrix
from allocator.contract.served_bank import ServedBank, open_served_bank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["chosen", "find_served_bank"]

_MANIFEST_VARIABLE = "GAMMA_MANIFEST"
_VERIFY_VARIABLE = "GAMMA_VERIFY"
_OVERRIDE = "gamma_manifest"


def find_served_bank(folder: Path, hf_config: "PreTrainedConfig | None") -> ServedBank:
    """The bank in `folder` with the manifest that `GAMMA_MANIFEST` or `--hf-overrides` names.

    Raises ContractError when there is no bank, no manifest is named, or the two do not belong together.
    """
    if not (folder / BANK_NAME).exists():
        raise ContractError(
            f"{folder}: its config.json has no quantization_config and there is no {BANK_NAME}; --quantization gamma "
            "serves checkpoints that `gamma export` wrote, and these need no flag, and banks of `gamma learn`"
        )
    named = os.environ.get(_MANIFEST_VARIABLE) or getattr(hf_config, _OVERRIDE, None)
    if not named:
        raise ContractError(
            f"{folder} is a bank: say which manifest to serve, by {_MANIFEST_VARIABLE}=manifest.json or by "
            f'--hf-overrides \'{{"{_OVERRIDE}": "manifest.json"}}\'; `gamma solve` writes manifests'
        )
    return open_served_bank(folder, Path(named), digests=os.environ.get(_VERIFY_VARIABLE) == "1")


def chosen(served: ServedBank, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream of a checkpoint, given that of the source model."""
    for name, tensor in weights:
        source_name, _, kind = name.rpartition(".")
        if name in served.dropped:
            continue
        if name in served.stacks:
            for matrix in served.stacks[name]:
                yield from _tensors(served, matrix.module, partial(_of_stack, tensor, matrix))
            continue
        for module_name in served.made_of(source_name) if kind == "weight" else ():
            yield from _tensors(served, module_name, partial(_arranged, served, module_name, tensor))
        if kind != "weight" or not served.made_of(source_name):
            yield name, tensor


def _tensors(served: ServedBank, name: str, weight: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of module `name`: its candidate's, or its `weight` where the manifest keeps it at 16 bits."""
    module = served.manifest.modules[name]
    if not module.quantized:
        yield f"{name}.weight", weight()
        return
    prefix = f"w{module.num_bits}."
    with safe_open(served.file(name), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith(prefix):
                yield f"{name}.{key.removeprefix(prefix)}", file.get_tensor(key)


def _of_stack(stack: Tensor, matrix: StackedMatrix) -> Tensor:
    whole = stack[matrix.expert].T if matrix.transposed else stack[matrix.expert]
    return whole[matrix.first_row : matrix.first_row + matrix.shape[0]].contiguous()


def _arranged(served: ServedBank, module: str, tensor: Tensor) -> Tensor:
    """The part of a tensor of the source that is `module`, as the bank's order of channels says."""
    order = served.bank.channel_order
    rows, columns = (None, None) if order is None else (order.rows(module), order.columns(module))
    if rows is not None:
        return tensor[torch.tensor(rows)]
    return tensor if columns is None else tensor[:, torch.tensor(columns)]
