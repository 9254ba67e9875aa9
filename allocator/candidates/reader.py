"""Reads candidates back from a bank, refusing files that are not the ones the bank was written with."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from allocator.contract.bank import BANK_NAME, Bank, candidate_tensors
from allocator.contract.digest import digest_file
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import dequantize
from allocator.contract.safetensors_file import read_header

__all__ = ["BankReader"]

_STRIPE = 4096  # a multiple of 32


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

    def formats(self, name: str) -> list[ModuleFormat]:
        """The candidates of module `name`: the stored ones, and last the source at 16 bits."""
        stored = self.bank.modules[name].candidates
        return [*stored, ModuleFormat(shape=stored[0].shape, num_bits=16)]

    def tensors(self, name: str, candidate: ModuleFormat) -> dict[str, Tensor]:
        """The packed tensors of module `name` at `candidate`, by the last part of their names."""
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
        prefix = f"w{candidate.num_bits}."
        with safe_open(path, framework="pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def dequantized(self, name: str, candidate: ModuleFormat) -> Tensor:
        """Float32 weight `[N, K]` of one candidate, made in stripes of rows to save memory."""
        packed = self.tensors(name, candidate)
        words, scale, zero_point = packed["weight_packed"], packed["weight_scale"], packed.get("weight_zero_point")
        rows, bits = candidate.shape[0], candidate.num_bits
        weight = torch.empty(candidate.shape, dtype=torch.float32)
        for start in range(0, rows, _STRIPE):
            end = min(start + _STRIPE, rows)
            # Zero points are packed along the rows: 32 of them in `bits` words.
            zeros = None if zero_point is None else zero_point[start * bits // 32 : -(-end * bits // 32)]
            weight[start:end] = dequantize(words[start:end], scale[start:end], zeros, bits)
        return weight
