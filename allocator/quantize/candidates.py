"""Candidates as weights, dequantized when they are asked for: those of a decoder block, and those of the vocabulary."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.contract.layout import ModuleFormat
from allocator.model import Inventory
from allocator.quantize.bank_reader import BankReader

__all__ = ["BlockCandidates", "Candidates", "VocabularyCandidates"]

_KEPT_BYTES = 1 << 30


class Candidates:
    """Weights of all candidates of some modules, by short names.

    formats: the candidates of each module, the last one being the source at 16 bits. All dequantized weights are kept
    if they fit into `kept_bytes`, so that small models are fast; else none is: at 32B those of one block have 14 GB.
    The attribute `kept_bytes` says how much that is.
    """

    def __init__(
        self,
        bank: BankReader,
        names: Mapping[str, str],
        source: Callable[[str], Tensor],
        device: torch.device,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        """names: short name -> module; source: the original weight of a module, float32 `[N, K]`, by its short name."""
        self._bank, self._names, self._device = bank, names, device
        self.source = source
        self.formats: dict[str, list[ModuleFormat]] = {short: bank.formats(name) for short, name in names.items()}
        needed = sum(4 * f.shape[0] * f.shape[1] for of in self.formats.values() for f in of)
        self._kept: dict[tuple[str, int], Tensor] | None = {} if needed <= kept_bytes else None
        self.kept_bytes = needed if needed <= kept_bytes else 0

    def weight(self, name: str, candidate: int) -> Tensor:
        """Float32 weight `[N, K]` of one candidate of module `name`, by its number in `formats[name]`."""
        form = self.formats[name][candidate]
        if not form.quantized:
            return self.source(name)
        if self._kept is not None and (name, candidate) in self._kept:
            return self._kept[name, candidate]
        weight = self._bank.dequantized(self._names[name], form).to(self._device)
        if self._kept is not None:
            self._kept[name, candidate] = weight
        return weight


class BlockCandidates(Candidates):
    """The modules of block `index`, by name inside the block."""

    def __init__(
        self,
        inventory: Inventory,
        stream: BlockStream,
        bank: BankReader,
        index: int,
        block: nn.Module,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        prefix = inventory.block_prefix(index)
        here = [m.name for m in inventory.modules if m.block == index and m.name in bank.bank.modules]
        names = {name.removeprefix(prefix): name for name in here}
        super().__init__(
            bank, names, lambda name: block.get_parameter(f"{name}.weight").data, stream.device, kept_bytes
        )


class VocabularyCandidates(Candidates):
    """What stands outside the blocks and has candidates: the embedding and the lm_head, or the one module for both.

    embedding, head: the names of the modules that give the rows of tokens, and the logits; None where that one has no
    candidates. In a tied model both are the same.
    """

    def __init__(self, inventory: Inventory, stream: BlockStream, bank: BankReader) -> None:
        here = [m for m in inventory.modules if m.block is None and m.name in bank.bank.modules]
        names = {m.name: m.name for m in here}
        super().__init__(bank, names, lambda name: stream.read(f"{name}.weight").float(), stream.device)
        by_role = {m.role: m.name for m in here}
        self.embedding = by_role.get("embedding")
        self.head = self.embedding if inventory.tied else by_role.get("lm_head")
