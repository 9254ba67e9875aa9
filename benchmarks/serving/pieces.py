"""The servers that are compared, on a CPU and on an NVIDIA GPU."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.manifest import Manifest, average_bits
from allocator.contract.resident import Kernel
from allocator.model import read_inventory, read_shape
from allocator.plan import PlanRequest
from allocator.plan.weights import residency_of
from benchmarks.serving.checkpoints import Fusion, Vocabulary, assign, uniform, write_checkpoint, write_model
from benchmarks.serving.report import ARK, AVX2_LOADS, BF16, CUDA_LOADS, LOADS, MARLIN, STOCK, Load

__all__ = ["AVX2_PIECES", "CPU_PIECES", "CUDA_PIECES", "Piece", "Variant", "file_name"]


@dataclass(frozen=True)
class Variant:
    """One server. `planned_bytes` is what `gamma plan` says of its weights in memory."""

    name: str
    folder: Path
    planned_bytes: int | None
    average_bits: float
    variables: dict[str, str]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Servers that are measured together: bfloat16, stock 4-bit, and gamma's at (bits, fusion, vocabulary).

    compiled: as vLLM does by default; else eager. apart: bfloat16 is served before the others, which do not fit beside
    it. avx2: vLLM's build for AVX2 has no operator for stock 4-bit (`cpu_gemm_wna16`); gamma's 3 bits are served with
    ARK too.
    """

    name: str
    model: str
    compiled: bool
    loads: tuple[Load, ...]
    gamma: tuple[tuple[float, Fusion, Vocabulary], ...]
    cuda: bool = False
    apart: bool = False
    avx2: bool = False

    def variants(self, out: Path) -> Iterator[Variant]:
        """Writes the checkpoints that are not there. On CUDA bfloat16 has no weights on disk."""
        source = write_model(self.model, out / self.model, weights=not self.cuda)
        inventory = read_inventory(source)
        yield Variant(BF16, source, None, 16.0, {}, ("--load-format", "dummy") if self.cuda else ())
        if not self.avx2:
            stock = uniform(inventory, 4)
            folder = write_checkpoint(source, stock, out / f"{self.model}-stock", "compressed-tensors")
            without = {"VLLM_PLUGINS": ""}
            yield Variant(STOCK, folder, None, average_bits(stock.modules), without)
            if self.cuda:
                marlin = ("--linear-backend", "marlin")
                yield Variant(MARLIN, folder, None, average_bits(stock.modules), without, marlin)
        for bits, fusion, vocabulary in self.gamma:
            manifest = assign(inventory, bits, fusion, vocabulary)
            name = f"gamma {bits} bits, {fusion}" + (", vocabulary at 16" if vocabulary == "16 bits" else "")
            folder = write_checkpoint(source, manifest, out / file_name(f"{self.model} {name}"))
            planned = _planned(source, manifest, "humming" if self.cuda else "native")
            yield Variant(name, folder, planned, average_bits(manifest.modules), {})
            if self.avx2 and bits == 3.0:
                planned, ark = _planned(source, manifest, "ark"), {"GAMMA_KERNEL": "ark"}
                yield Variant(ARK, folder, planned, average_bits(manifest.modules), ark)


def _planned(model: Path, manifest: Manifest, kernel: Kernel) -> int:
    shape = read_shape(json.loads((model / "config.json").read_text()))
    (planned,) = residency_of(shape, PlanRequest(kernel=kernel)).stage_bytes(manifest.modules)
    return planned


_THREE: tuple[float, Fusion, Vocabulary] = (3.0, "free", "quantized")
_TIED: tuple[float, Fusion, Vocabulary] = (3.0, "tied", "quantized")
_SMALL: tuple[float, Fusion, Vocabulary] = (2.5, "free", "quantized")
_FOUR: tuple[float, Fusion, Vocabulary] = (4.0, "free", "quantized")

CPU_PIECES = (
    Piece("Qwen3-0.6B", "Qwen3-0.6B", True, LOADS, (_SMALL, _THREE, _TIED)),
    # Apart, since seven servers at a time do not fit into 24 GiB.
    Piece("Qwen3-0.6B, more", "Qwen3-0.6B", True, LOADS, (_FOUR, (3.0, "free", "16 bits"))),
    Piece("Qwen3-0.6B, eager", "Qwen3-0.6B", False, (LOADS[0],), (_SMALL, _THREE, _FOUR)),
    Piece("Qwen3-1.7B", "Qwen3-1.7B", True, LOADS, (_THREE,)),
)
AVX2_PIECES = (Piece("Qwen3-0.6B, AVX2", "Qwen3-0.6B", True, AVX2_LOADS, (_SMALL, _THREE, _FOUR), avx2=True),)
CUDA_PIECES = (
    Piece("Qwen3-8B", "Qwen3-8B", True, CUDA_LOADS, (_SMALL, _THREE, _TIED), cuda=True),
    Piece("Qwen3-32B", "Qwen3-32B", True, CUDA_LOADS, (_THREE,), cuda=True, apart=True),
)


def file_name(text: str) -> str:
    return text.replace(" ", "-").replace(",", "")
