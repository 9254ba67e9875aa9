"""Builds the bank block by block, and leaves the teacher's hidden states behind for learning."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from allocator.blocks.calibration import Calibration
from allocator.blocks.hidden import HiddenStates
from allocator.blocks.source import torch_dtype, write_safetensors
from allocator.blocks.stream import BlockStream
from allocator.contract.bank import BANK_NAME, Bank, BankModule, ModelReference
from allocator.contract.digest import digest_file
from allocator.inventory import Inventory, Module
from allocator.progress import Progress, silent
from allocator.quantizers import InputStatistics, Quantizer

__all__ = ["build_bank"]


def build_bank(
    inventory: Inventory,
    model: ModelReference,
    stream: BlockStream,
    calibration: Calibration,
    hidden: HiddenStates,
    quantizer: Quantizer,
    widths: Sequence[int],
    group_size: int,
    symmetric: bool,
    folder: Path,
    progress: Progress = silent,
) -> Bank:
    """Quantize every quantizable module to every width below 16, write `folder`, fill `hidden` with teacher states.

    `bank.json` is written last: a folder without it is an unfinished bank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BANK_NAME).unlink(missing_ok=True)
    modules: dict[str, BankModule] = {}
    stream.fill_embeddings(hidden, calibration.token_ids)
    for index in range(stream.blocks):
        in_block = {m.name: m for m in inventory.modules if m.block == index}
        local = _local_names(in_block, index, inventory)
        statistics = _run_teacher(stream, index, hidden, list(local), quantizer.needs_statistics)
        for done, (name, module_name) in enumerate(local.items()):
            progress("candidates", (index + done / len(local)) / stream.blocks)
            stored = _quantize_module(
                in_block[module_name],
                inventory,
                stream,
                quantizer,
                statistics.get(name),
                widths,
                group_size,
                symmetric,
                folder,
            )
            if stored is not None:
                modules[module_name] = stored
    progress("candidates", 1.0)
    bank = Bank(
        model=model,
        dtype=inventory.dtype,
        quantizer=quantizer.name,
        group_size=group_size,
        symmetric=symmetric,
        calibration_digest=calibration.digest,
        modules=modules,
    )
    bank.write(folder / BANK_NAME)
    return bank


def _local_names(in_block: dict[str, Module], index: int, inventory: Inventory) -> dict[str, str]:
    """Name inside the block -> module name, linear modules only."""
    prefix = inventory.block_prefix(index)
    return {name.removeprefix(prefix): name for name in in_block}


def _run_teacher(
    stream: BlockStream, index: int, hidden: HiddenStates, names: list[str], with_statistics: bool
) -> dict[str, InputStatistics]:
    """Fill the states after block `index`; return the input statistics of its modules where they are needed."""
    shared: dict[tuple[str, ...], InputStatistics] = {}

    def accumulate(sharing: list[str], x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        entry = shared.setdefault(tuple(sharing), InputStatistics(rows.new_zeros(rows.shape[1], rows.shape[1]), 0))
        entry.hessian += rows.T @ rows
        entry.tokens += rows.shape[0]

    stream.fill_block(hidden, index, names if with_statistics else [], accumulate)
    return {name: statistics for sharing, statistics in shared.items() for name in sharing}


def _quantize_module(
    module: Module,
    inventory: Inventory,
    stream: BlockStream,
    quantizer: Quantizer,
    statistics: InputStatistics | None,
    widths: Sequence[int],
    group_size: int,
    symmetric: bool,
    folder: Path,
) -> BankModule | None:
    formats = [f for f in inventory.formats(module, widths, group_size, symmetric) if f.quantized]
    if not formats:
        return None
    weight = stream.read(f"{module.name}.weight").float()
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        for candidate in formats:
            quantized = quantizer.quantize(weight, candidate, torch_dtype(inventory.dtype), statistics)
            packed = quantized.packed(candidate.num_bits)
            tensors |= {f"w{candidate.num_bits}.{part}": tensor.cpu() for part, tensor in packed.items()}
    file = f"{module.name}.safetensors"
    write_safetensors(tensors, folder / file)
    return BankModule(file=file, file_digest=digest_file(folder / file), candidates=formats)
