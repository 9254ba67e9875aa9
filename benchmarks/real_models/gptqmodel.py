"""Rows of GPTQModel, its own program with its defaults but for width, group size and text.

It needs a torch of its own (6 GB with what it brings), so it is not installed here: GAMMA_GPTQMODEL_PYTHON names the
Python of an environment that has gptqmodel 7.7.0. It leaves embedding and lm_head at 16 bits.
"""

import os
from pathlib import Path

from torch import Tensor

from allocator.contract.errors import InputError
from benchmarks.real_models.cells import Bench
from benchmarks.real_models.process import Cost, run_command
from benchmarks.real_models.programs import group_size_of, measured

__all__ = ["GptqModel"]

_WIDTHS = (2, 3, 4)
_ZERO_OFFSET = 1
_VARIABLE = "GAMMA_GPTQMODEL_PYTHON"


class GptqModel:
    """token_ids: int64 `[sequences, length]`, the calibration text."""

    def __init__(self, bench: Bench, token_ids: Tensor) -> None:
        self.bench, self.token_ids = bench, token_ids

    def rows(self) -> None:
        """W2, W3 and W4. Raises InputError where no environment is named and a row is to be made."""
        for bits in _WIDTHS:
            name = f"GPTQModel W{bits}"
            settings = {"bits": bits, "group_size": group_size_of(self.bench)}
            measured(self.bench, "GPTQModel", name, self.token_ids, settings, self._quantize, _ZERO_OFFSET)

    def _quantize(self, arguments: list[str]) -> Cost:
        python = os.environ.get(_VARIABLE)
        if not python:
            raise InputError(
                f"{_VARIABLE} is not set; it names the Python of an environment with `pip install gptqmodel==7.7.0`"
            )
        script = str(Path(__file__).with_name("gptqmodel_quantize.py"))
        # Its pool of workers has half of the cores, and its loader wants two of them.
        command = [python, "-P", script, *arguments]  # -P: what lies beside the script is not imported
        return run_command(command, "GPTQModel", {"GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""})
