"""What the bank is to hold and what is learned on, as it was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.contract.layout import WIDTHS
from allocator.model import CandidateFormats, Inventory, cut_unsorted
from allocator.pipeline.effort import DEFAULT_EFFORT, EFFORTS

__all__ = ["CandidateSettings"]


@dataclass(frozen=True)
class CandidateSettings:
    """What the bank holds, and the calibration text that learning runs on (`None`: see `--calibration`).

    `channel_blocks`: into how many pieces gate_proj and up_proj are cut (`--granularity channel-block`), None for
    whole modules.
    """

    quantizer: str = EFFORTS[DEFAULT_EFFORT].quantizer
    widths: Sequence[int] = WIDTHS
    group_size: int = 128
    symmetric: bool = False
    channel_blocks: int | None = None
    calibration: Sequence[Path] | None = None
    sequences: int | None = None
    sequence_length: int | None = None
    seed: int = 0

    @property
    def formats(self) -> CandidateFormats:
        return CandidateFormats(self.widths, self.group_size, self.symmetric)

    def cut(self, inventory: Inventory) -> Inventory:
        """The model with the modules that are asked for, before they are sorted: for names, shapes and bytes."""
        return cut_unsorted(inventory, self.channel_blocks)

    @property
    def amount_is_given(self) -> bool:
        return self.sequences is not None or self.sequence_length is not None

    def amount(self, inventory: Inventory) -> tuple[int, int]:
        """Number and length of the calibration sequences: as they are given, else what the model's size asks for."""
        from allocator.blocks.calibration import calibration_amount

        return calibration_amount(inventory.parameters, inventory.positions, self.sequences, self.sequence_length)

    def recorded(self, quantizer: str) -> dict[str, Any]:
        """What decides about the candidates besides model and text; `quantizer` is its full name."""
        chosen: dict[str, Any] = {
            "quantizer": quantizer,
            "widths": sorted({width for width in self.widths if width < 16}),
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }
        return chosen | ({} if self.channel_blocks is None else {"channel_blocks": self.channel_blocks})
