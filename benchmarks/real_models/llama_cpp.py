"""Rows of llama.cpp: its own quantizer, through the shared library in `llama-cpp-py-sync`, with an importance matrix.

The importance of a weight is the mean square of its input over the calibration text, which is what llama.cpp's own tool
collects; like there, embedding and lm_head have none. Rows whose length is no multiple of 256 fall back to other types
than the file is named for: each result says which types it has. The file is read back with `gguf`.

The library needs glibc 2.38 (Debian 13, Ubuntu 24.04). On an older machine GAMMA_GLIBC names the folder of a newer
libc.so.6 and its loader, e.g. that of Debian 13's libc6 unpacked with `dpkg -x`.
"""

import os
import platform
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allocator.contract.errors import InputError
from benchmarks.real_models.cells import OFF_GRID, Bench, Quantized
from benchmarks.real_models.packages import use_packages
from benchmarks.real_models.process import run_command
from benchmarks.real_models.sizes import sizes_of

__all__ = ["FILE_TYPES", "LlamaCpp", "mean_squares"]

FILE_TYPES = {"Q2_K": 10, "IQ2_XS": 20, "IQ2_M": 29, "IQ3_XXS": 23, "Q3_K_M": 12, "IQ4_XS": 30, "Q4_K_M": 15}
"""Numbers of llama.cpp's `enum llama_ftype`."""
_GLIBC = (2, 38)


class LlamaCpp:
    """token_ids: int64 `[S, T]`, the calibration text of the importance matrix."""

    def __init__(self, bench: Bench, token_ids: Tensor) -> None:
        self.bench, self.token_ids = bench, token_ids
        self.folder = bench.work / "llama.cpp"
        self.folder.mkdir(exist_ok=True)

    def row(self, file_type: str, suffix: str = "") -> None:
        self.bench.cell(
            f"llama.cpp {file_type}{suffix}", lambda: self._quantized(file_type), with_tasks=suffix != OFF_GRID
        )

    def off_grid(self, file_type: str = "Q4_K_M") -> None:
        """The row of `file_type` for the model with its weights off the grid of the file that they come from."""
        name = f"llama.cpp {file_type}{OFF_GRID}"
        if self.bench.wants(name) and not self.bench.path(name).exists():
            LlamaCpp(self.bench.off_grid, self.token_ids).row(file_type, OFF_GRID)
            self.bench.take_off_grid(name)

    def _quantized(self, file_type: str) -> Quantized:
        use_packages()
        from gguf import GGUFReader

        from benchmarks.real_models.gguf_model import weights_of_gguf

        target = self.folder / f"{file_type}.gguf"
        command = [*_loader(), sys.executable, str(Path(__file__).with_name("llama_cpp_quantize.py"))]
        command += [str(self._source()), str(target), str(FILE_TYPES[file_type]), str(self._importance())]
        cost = run_command(command, f"llama.cpp quantize {file_type}")
        reader = GGUFReader(target)
        tensors = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2)
        model = self.bench.with_weights(weights_of_gguf(reader, self.bench.model.tied))
        sizes = sizes_of(tensors, [target.stat().st_size], self.bench.weights, self.bench.model.tied)
        target.unlink()
        return Quantized(model, sizes, cost, {"rival": "llama.cpp", "types": dict(types)})

    def _source(self) -> Path:
        """The original as a GGUF file in bfloat16."""
        from benchmarks.real_models.gguf_model import gguf_from_weights

        path = self.folder / "original.gguf"
        if not path.exists():
            weights = load_file(self.bench.folder / "model.safetensors")
            partial = path.with_suffix(".partial")
            gguf_from_weights(self.bench.model.gguf, weights.__getitem__, partial, self.bench.model.tied)
            partial.replace(path)
        return path

    def _importance(self) -> Path:
        from benchmarks.real_models.gguf_model import gguf_name

        path = self.folder / "imatrix.safetensors"
        if not path.exists():
            found = mean_squares(self.bench.load(self.bench.folder), self.token_ids)
            family = str(self.bench.inventory.config["model_type"]).removesuffix("_text")
            save_file({gguf_name(family, f"{name}.weight"): values for name, values in found.items()}, path)
        return path


def _loader() -> list[str]:
    """What starts a program with the glibc of GAMMA_GLIBC. Raises InputError where that of the machine is too old."""
    if folder := os.environ.get("GAMMA_GLIBC"):
        library_path = f"{folder}:/usr/lib/x86_64-linux-gnu"
        return [f"{folder}/ld-linux-x86-64.so.2", "--library-path", library_path]
    version = platform.libc_ver()[1]
    if tuple(map(int, version.split("."))) < _GLIBC:
        raise InputError(
            f"llama.cpp's library needs glibc {'.'.join(map(str, _GLIBC))}, here is {version}; set GAMMA_GLIBC to the "
            "folder of a newer libc.so.6 (of Debian 13, unpacked with dpkg -x), or leave llama.cpp out with --rivals"
        )
    return []


def mean_squares(model: nn.Module, token_ids: Tensor) -> dict[str, Tensor]:
    """Mean square of every input of the blocks' linear modules over `token_ids`: float32 `[in_features]` by name."""
    sums: dict[str, Tensor] = {}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}

    def add(name: str, states: Tensor) -> None:
        squares = states.flatten(0, -2).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, module in linears.items()
    ]
    with torch.inference_mode():
        for rows in token_ids:
            model(rows[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: (total / token_ids.numel()).float() for name, total in sums.items()}
