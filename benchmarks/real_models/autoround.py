"""Rows of AutoRound, its own program in a process of its own: one width with its learned rounding, and AutoScheme.

It takes the same calibration sequences as GAMMA, asymmetric groups of 64 or 128 (the larger that divides the hidden
size) and its default of 200 steps a block. It leaves the embedding at 16 bits, and with it a tied lm_head.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.real_models.cells import Bench
from benchmarks.real_models.packages import installed
from benchmarks.real_models.process import Cost, run_command
from benchmarks.real_models.programs import group_size_of, measured

__all__ = ["ITERATIONS", "AutoRound"]

_WIDTHS = (2, 3, 4)
_SCHEME_WIDTHS = (2, 3, 4, 8)
ITERATIONS = 200
"""AutoRound's default."""


class AutoRound:
    """token_ids: int64 `[sequences, length]`, the calibration text; iterations: steps a block."""

    def __init__(self, bench: Bench, token_ids: Tensor, iterations: int = ITERATIONS) -> None:
        self.bench, self.token_ids, self.iterations = bench, token_ids, iterations

    def rows(self, bits: Sequence[float]) -> None:
        """W2, W3 and W4, and AutoScheme at those of `bits` that its narrowest scheme allows."""
        for width in _WIDTHS:
            self.row(f"AutoRound W{width}", [width], None)
        for wanted in bits:
            if wanted > min(_SCHEME_WIDTHS) + 0.3:  # its scales and zero points take about a quarter of a bit
                self.row(f"AutoRound AutoScheme {wanted}", _SCHEME_WIDTHS, wanted)

    def row(self, name: str, widths: Sequence[int], average_bits: float | None) -> None:
        """One of them."""
        settings = {"widths": list(widths), "average_bits": average_bits, "group_size": group_size_of(self.bench)}
        settings["iters"] = self.iterations

        def quantize(arguments: list[str]) -> Cost:
            packages = installed("requirements-autoround.txt", "autoround")
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
            script = str(Path(__file__).with_name("autoround_quantize.py"))
            return run_command([sys.executable, script, *arguments], name, {"PYTHONPATH": path})

        measured(self.bench, "AutoRound", name, self.token_ids, settings, quantize)
