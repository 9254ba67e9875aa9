"""Reads candidates back from a bank, refusing files that it was not written with, and makes a bank servable."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from allocator.contract.bank import BANK_NAME, Bank, candidate_tensors
from allocator.contract.digest import digest_file
from allocator.contract.documents import write_atomically
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import dequantize, dequantize_rows
from allocator.contract.safetensors_file import INDEX_NAME, copy_renamed, read_header
from allocator.contract.served_bank import LAYOUT_KEY
from allocator.model import Inventory, carry, copy_whole, in_channel_order
from allocator.model.expert_stacks import ExpertMatrix
from allocator.model.other_names import SCORE_NAME
from allocator.model.quantized_source import DequantizedTensor

__all__ = [
    "BankReader",
    "make_servable",
    "stripes",
]

_STRIPE = 4096  # a multiple of 32: so many zero points are whole words


class BankReader:
    """An opened bank. Headers of all files are checked at once, contents when a file is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bank = Bank.read(folder / BANK_NAME)
        self._verified: set[str] = set()
        for name, module in self.bank.modules.items():
            stored = read_header(folder / module.file)
            expected = {t.name: t for c in module.candidates for t in candidate_tensors(c, self.bank.dtype)}
            for tensor in expected.values():
                found = stored.get(tensor.name)
                if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                    shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
                    raise ContractError(
                        f"{folder / module.file}: {name}: {tensor.name} is {shown}, "
                        f"the bank says {tensor.dtype} {list(tensor.shape)}; build the bank again"
                    )
            if extra := stored.keys() - expected.keys():
                raise ContractError(f"{folder / module.file}: {name}: unknown tensor {sorted(extra)[0]}")

    def arranged(self, inventory: Inventory) -> Inventory:
        """The model as the bank's modules are of it."""
        return in_channel_order(inventory, self.bank.channel_order)

    def formats(self, name: str) -> list[ModuleFormat]:
        """The candidates of module `name`: the stored ones, and last the source at 16 bits."""
        stored = self.bank.modules[name].candidates
        return [*stored, ModuleFormat(shape=stored[0].shape, num_bits=16)]

    def tensors(self, name: str, candidate: ModuleFormat) -> dict[str, Tensor]:
        """The packed tensors of module `name` at `candidate`, by the last part of their names."""
        prefix = f"w{candidate.num_bits}."
        with safe_open(self._checked(name, candidate), framework="pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def dequantized(self, name: str, candidate: ModuleFormat) -> Tensor:
        """Float32 weight `[N, K]` of one candidate, made in stripes of rows to save memory."""
        weight = torch.empty(candidate.shape, dtype=torch.float32)
        for rows in stripes(candidate.shape[0]):
            weight[rows] = self.stripe(name, candidate, rows)
        return weight

    def stripe(self, name: str, candidate: ModuleFormat, rows: slice, device: str | torch.device = "cpu") -> Tensor:
        """Rows `rows` (one of `stripes`) of `dequantized`; only they are read."""
        prefix, bits = f"w{candidate.num_bits}.", candidate.num_bits
        with safe_open(self._checked(name, candidate), framework="pt", device=str(device)) as file:
            words, scale = (file.get_slice(prefix + part)[rows] for part in ("weight_packed", "weight_scale"))
            # Zero points are packed along the rows: 32 of them in `bits` words.
            within = slice(rows.start * bits // 32, -(-rows.stop * bits // 32))
            zeros = None if candidate.symmetric else file.get_slice(prefix + "weight_zero_point")[within]
        return dequantize(words, scale, zeros, bits)

    def rows(self, name: str, candidate: ModuleFormat, numbers: Tensor) -> Tensor:
        """Rows `numbers` (int64 `[n]`) of `dequantized`: `[n, K]`."""
        packed = self.tensors(name, candidate)
        return dequantize_rows(
            numbers.cpu(), packed["weight_packed"], packed["weight_scale"], packed.get("weight_zero_point"),
            candidate.num_bits,
        )  # fmt: skip

    def _checked(self, name: str, candidate: ModuleFormat) -> Path:
        """The file of module `name`, which has `candidate` and, as was checked when it was first used, its content."""
        module = self.bank.modules.get(name)
        if module is None or candidate not in module.candidates:
            raise ContractError(
                f"{self.folder}: the bank has no {candidate.num_bits}-bit candidate of {name} "
                f"with shape {list(candidate.shape)} and group {candidate.group_size}"
            )
        path = self.folder / module.file
        if name not in self._verified:
            found = digest_file(path)
            if found != module.file_digest:
                raise ContractError(
                    f"{path}: {name}: content is {found}, the bank says {module.file_digest}; build the bank again"
                )
            self._verified.add(name)
        return path


def stripes(rows: int) -> list[slice]:
    """The rows of a module in stripes that can be read by themselves."""
    return [slice(start, min(start + _STRIPE, rows)) for start in range(0, rows, _STRIPE)]


def make_servable(inventory: Inventory, bank_folder: Path, *, copy: bool = False) -> None:
    """Put the model's config and side files, links to its safetensors files (`copy`: the files themselves) and
    an index of the tensors that a checkpoint has into `bank_folder`.

    What is there already is replaced. Where the files are quantized there is no index, and no link to them: a server
    that is started on the folder says that a checkpoint must be exported.
    """
    bank_folder.mkdir(parents=True, exist_ok=True)
    wholes = (t.stack if isinstance(t, ExpertMatrix) else t for t in inventory.tensors)
    tensors = list({tensor.name: tensor for tensor in wholes}.values())
    carry(inventory, bank_folder)
    if any(isinstance(tensor, DequantizedTensor) for tensor in tensors):
        write_atomically(bank_folder / "config.json", json.dumps(inventory.config, indent=2) + "\n")
        (bank_folder / INDEX_NAME).unlink(missing_ok=True)
        return
    for path in sorted({tensor.path for tensor in tensors}):
        target = bank_folder / path.name
        target.unlink(missing_ok=True)
        if inventory.prefix is not None:  # a server looks for the architecture's names
            copy_renamed(path, target, inventory.prefix, ("lm_head.", f"{SCORE_NAME}."))
        elif copy:
            copy_whole(path, target)
        else:
            os.symlink(path.resolve(), target)
    copy_whole(inventory.folder / "config.json", bank_folder / "config.json")
    weight_map = {tensor.name: tensor.path.name for tensor in tensors}
    metadata: dict[str, Any] = {"total_size": sum(t.nbytes for t in tensors)}
    if inventory.shape.experts is not None:
        metadata[LAYOUT_KEY] = inventory.shape.experts.layout
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(bank_folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
