"""Assignments measured without writing checkpoints: the bank's candidates put into a model in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.hf_model import open_model
from allocator.contract.channel_blocks import parent_of
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.evaluate.divergence import Divergence, measure_divergence
from allocator.quantize import BankReader

__all__ = ["AssignmentMeter"]


class AssignmentMeter:
    """Holds the original model and one copy, whose weights become those of each assignment in turn.

    Float32, on the CPU: both must fit into memory. Weights that two assignments share are not set again.
    """

    def __init__(self, folder: Path, bank: BankReader, token_ids: Tensor) -> None:
        """token_ids: int64 `[sequences, length]`, text that was not calibrated on."""
        self._bank, self._token_ids = bank, token_ids
        self._original = self._load(folder)
        self.student = self._load(folder)
        self._set: dict[str, ModuleFormat] = {}

    def measure(self, assignment: Mapping[str, ModuleFormat]) -> Divergence:
        """Divergence of the model with `assignment` from the original.

        Raises ContractError for a module that the model or the bank does not have.
        """
        with torch.no_grad():
            for name, form in assignment.items():
                if self._set.get(name) != form:
                    self._put(name, form)
                    self._set[name] = form
        return measure_divergence(self._original, self.student, self._token_ids)

    def _put(self, name: str, form: ModuleFormat) -> None:
        """Set the student's weight of `name`: only the rows of a piece, and columns where the model has them."""
        parent, order = parent_of(name), self._bank.bank.channel_order
        weight, original = self._weight(self.student, parent), self._weight(self._original, parent)
        rows = None if order is None else order.rows(name)
        columns = None if order is None else order.columns(name)
        if rows is not None:
            at = torch.tensor(rows)
            weight[at] = self._bank.dequantized(name, form) if form.quantized else original[at]
        elif columns is not None and form.quantized:
            weight[:, torch.tensor(columns)] = self._bank.dequantized(name, form)
        else:
            weight.copy_(self._bank.dequantized(name, form) if form.quantized else original)

    def _weight(self, model: Any, name: str) -> Tensor:
        try:
            weight: Tensor = model.get_parameter(f"{name}.weight")
        except AttributeError:
            raise ContractError(
                f"{name}: the model in transformers has no such module; measure its checkpoint"
            ) from None
        return weight

    @staticmethod
    def _load(folder: Path) -> Any:
        return open_model(folder)
