"""Which formats the candidates of a model have."""

from collections.abc import Sequence
from dataclasses import dataclass

from allocator.contract.layout import WIDTHS, ModuleFormat
from allocator.model.inventory import Inventory

__all__ = ["CandidateFormats"]


@dataclass(frozen=True)
class CandidateFormats:
    """`widths` in bits, groups of at most `group_size` weights, `symmetric` if without zero points."""

    widths: Sequence[int] = WIDTHS
    group_size: int = 128
    symmetric: bool = False

    def of(self, inventory: Inventory) -> dict[str, list[ModuleFormat]]:
        """Those below 16 bits of each module, narrowest first; none for a module that stays at 16 bits."""
        return {name: [form for form in forms if form.quantized] for name, forms in self._all(inventory).items()}

    def narrowest(self, inventory: Inventory) -> dict[str, ModuleFormat]:
        """The smallest assignment."""
        return {name: forms[0] for name, forms in self._all(inventory).items()}

    def feasible_bytes(self, inventory: Inventory) -> tuple[int, int]:
        """Bytes of tensors of the smallest and the largest checkpoint."""
        return inventory.feasible_bytes(self.widths, self.group_size, self.symmetric)

    def _all(self, inventory: Inventory) -> dict[str, list[ModuleFormat]]:
        return {
            module.name: inventory.formats(module, self.widths, self.group_size, self.symmetric)
            for module in inventory.modules
        }
