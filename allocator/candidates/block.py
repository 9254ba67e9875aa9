"""The candidates of one decoder block as weights, dequantized when they are asked for."""

from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.candidates.reader import BankReader
from allocator.contract.layout import ModuleFormat
from allocator.inventory import Inventory

__all__ = ["BlockCandidates"]

_KEPT_BYTES = 1 << 30


class BlockCandidates:
    """Weights of all candidates of the modules of block `index`, by name inside the block.

    formats: the candidates of each module, the last one being the source at 16 bits. All dequantized weights are kept
    if they fit into `kept_bytes`, so that small models are fast; else none is: at 32B those of one block have 14 GB.
    The attribute `kept_bytes` says how much that is.
    """

    def __init__(
        self,
        inventory: Inventory,
        stream: BlockStream,
        bank: BankReader,
        index: int,
        block: nn.Module,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self._bank, self._block, self._device = bank, block, stream.device
        self._prefix = inventory.block_prefix(index)
        self.formats: dict[str, list[ModuleFormat]] = {}
        for module in inventory.modules:
            if module.block == index and module.name in bank.bank.modules:
                self.formats[module.name.removeprefix(self._prefix)] = bank.formats(module.name)
        needed = sum(4 * f.shape[0] * f.shape[1] for of in self.formats.values() for f in of)
        self._kept: dict[tuple[str, int], Tensor] | None = {} if needed <= kept_bytes else None
        self.kept_bytes = needed if needed <= kept_bytes else 0

    def source(self, name: str) -> Tensor:
        """The original weight of module `name`, float32 `[N, K]`."""
        return self._block.get_parameter(f"{name}.weight").data

    def weight(self, name: str, candidate: int) -> Tensor:
        """Float32 weight `[N, K]` of one candidate of module `name`, by its number in `formats[name]`."""
        form = self.formats[name][candidate]
        if not form.quantized:
            return self.source(name)
        if self._kept is not None and (name, candidate) in self._kept:
            return self._kept[name, candidate]
        weight = self._bank.dequantized(self._prefix + name, form).to(self._device)
        if self._kept is not None:
            self._kept[name, candidate] = weight
        return weight
