"""Rows of AutoRound, its own program in a process of its own: one width with its learned rounding, and AutoScheme.

It takes the same calibration sequences as GAMMA, asymmetric groups of 64 or 128 (the larger that divides the hidden
size) and its default of 200 steps a block. It leaves the embedding at 16 bits, and with it a tied lm_head.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allocator.contract.digest import digest_bytes
from allocator.contract.documents import write_atomically
from allocator.contract.packing import unpack_codes
from benchmarks.real_models.cells import Bench, Quantized
from benchmarks.real_models.ours import folder_sizes
from benchmarks.real_models.packages import installed
from benchmarks.real_models.process import Cost, run_command

__all__ = ["ITERATIONS", "AutoRound", "unpacked"]

_WIDTHS = (2, 3, 4)
_SCHEME_WIDTHS = (2, 3, 4, 8)
ITERATIONS = 200
"""AutoRound's default."""


class AutoRound:
    """token_ids: int64 `[sequences, length]`, the calibration text; iterations: steps a block."""

    def __init__(self, bench: Bench, token_ids: Tensor, iterations: int = ITERATIONS) -> None:
        self.bench, self.token_ids, self.iterations = bench, token_ids, iterations
        self.group_size = 128 if bench.inventory.config["hidden_size"] % 128 == 0 else 64

    def rows(self, bits: Sequence[float]) -> None:
        """W2, W3 and W4, and AutoScheme at those of `bits` that its narrowest scheme allows."""
        for width in _WIDTHS:
            self.row(f"AutoRound W{width}", [width], None)
        for wanted in bits:
            if wanted > min(_SCHEME_WIDTHS) + 0.3:  # its scales and zero points take about a quarter of a bit
                self.row(f"AutoRound AutoScheme {wanted}", _SCHEME_WIDTHS, wanted)

    def row(self, name: str, widths: Sequence[int], average_bits: float | None) -> None:
        """One of them; its checkpoint is kept, since an hour of work is in it."""
        settings = {"widths": list(widths), "average_bits": average_bits, "group_size": self.group_size}
        settings["iters"] = self.iterations

        def make() -> Quantized:
            folder, cost = self._quantized(name, settings)
            model = self.bench.load(self.bench.folder)
            state = dict(unpacked(folder, {k: tuple(v.shape) for k, v in model.state_dict().items()}))
            model.load_state_dict(state, strict=False, assign=True)
            model.tie_weights()
            return Quantized(model, folder_sizes(self.bench, folder), cost, {"rival": "AutoRound", **settings})

        self.bench.cell(name, make, f"{self.iterations} iterations")

    def _quantized(self, name: str, settings: dict[str, Any]) -> tuple[Path, Cost]:
        """The folder of the checkpoint, made now if it is not there or of other settings, and what making it cost."""
        folder = self.bench.work / "autoround" / name.replace(" ", "_")
        done, made_of = folder / "done.json", {"settings": settings, "text": _digest(self.token_ids)}
        if not done.exists() or (kept := json.loads(done.read_text()))["made_of"] != made_of:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            save_file({"token_ids": self.token_ids.contiguous()}, folder / "tokens.safetensors")
            (folder / "settings.json").write_text(json.dumps(settings))
            command = [sys.executable, str(Path(__file__).with_name("autoround_quantize.py")), str(self.bench.folder)]
            command += [str(folder / part) for part in ("tokens.safetensors", "out", "settings.json")]
            packages = installed("requirements-autoround.txt", "autoround")
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
            cost = run_command(command, name, {"PYTHONPATH": path})
            kept = {"made_of": made_of, "cost": cost.record()}
            write_atomically(done, json.dumps(kept))
        return next((folder / "out").rglob("config.json")).parent, Cost(**kept["cost"])


def _digest(token_ids: Tensor) -> str:
    return digest_bytes(token_ids.contiguous().numpy().tobytes())


def unpacked(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
    """Name and float32 weight of every tensor of an AutoRound checkpoint; `shapes`: of the model's weights by name."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight":
            rows, columns = shapes[f"{stem}.weight"]
            num_bits = 32 * len(tensor) // columns
            codes = unpack_codes(tensor.T.contiguous(), num_bits).float()
            scales = stored[f"{stem}.scales"].float().T
            zeros = unpack_codes(stored[f"{stem}.qzeros"], num_bits).float().T
            grouped = codes.unflatten(1, (scales.shape[1], -1))
            weight = ((grouped - zeros[..., None]) * scales[..., None]).reshape(rows, columns)
            yield f"{stem}.weight", torch.nn.Parameter(weight, requires_grad=False)
        elif kind not in ("scales", "qzeros", "g_idx"):
            yield name, torch.nn.Parameter(tensor.float(), requires_grad=False)
