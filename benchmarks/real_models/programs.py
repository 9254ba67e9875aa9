"""Checkpoints that quantizers of others write, run in processes of their own, and the models that they stand for."""

import json
import shutil
from collections.abc import Callable, Iterator
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
from benchmarks.real_models.process import Cost

__all__ = ["group_size_of", "measured", "unpacked"]

_PARTS = ("scales", "qzeros")


def group_size_of(bench: Bench) -> int:
    """The larger of 64 and 128 that divides the hidden size."""
    return 128 if bench.inventory.config["hidden_size"] % 128 == 0 else 64


def measured(
    bench: Bench,
    rival: str,
    name: str,
    token_ids: Tensor,
    settings: dict[str, Any],
    quantize: Callable[[list[str]], Cost],
    zero_offset: int = 0,
) -> None:
    """The row `name` of the program `rival`: `quantize` gets the arguments MODEL TOKENS.safetensors OUT settings.json
    of a script and returns what it cost. The checkpoint is kept, since an hour of work may be in it, and made again for
    other settings or text. zero_offset: see `unpacked`."""

    def make() -> Quantized:
        folder = bench.work / rival.lower() / name.replace(" ", "_")
        done, made_of = folder / "done.json", {"settings": settings, "text": _digest(token_ids)}
        if not done.exists() or (kept := json.loads(done.read_text()))["made_of"] != made_of:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            save_file({"token_ids": token_ids.contiguous()}, folder / "tokens.safetensors")
            (folder / "settings.json").write_text(json.dumps(settings))
            parts = [str(folder / part) for part in ("tokens.safetensors", "out", "settings.json")]
            kept = {"made_of": made_of, "cost": quantize([str(bench.folder), *parts]).record()}
            write_atomically(done, json.dumps(kept))
        checkpoint = next((folder / "out").rglob("config.json")).parent
        model = bench.with_weights(unpacked(checkpoint, zero_offset))
        more = {"rival": rival, **settings}
        return Quantized(model, folder_sizes(bench, checkpoint), Cost(**kept["cost"]), more)

    bench.cell(name, make, digest_bytes(json.dumps(settings, sort_keys=True).encode()))


def _digest(token_ids: Tensor) -> str:
    return digest_bytes(token_ids.contiguous().numpy().tobytes())


def unpacked(folder: Path, zero_offset: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 weight of every tensor of a checkpoint with `qweight`, `qzeros` and `scales`.

    zero_offset: what is added to stored zero points (1 in GPTQ's first format).
    """
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight":
            groups = stored.get(f"{stem}.g_idx")
            yield f"{stem}.weight", _weight(tensor, *(stored[f"{stem}.{part}"] for part in _PARTS), groups, zero_offset)
        elif kind not in (*_PARTS, "g_idx"):
            yield name, tensor.float()


def _weight(packed: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None, zero_offset: int) -> Tensor:
    """float32 `[out_features, in_features]`. packed: codes along the columns, `[words, out_features]`; scales `[groups,
    out_features]`; zeros: packed along the rows; groups: of each column, one after the other if there are none."""
    num_bits = 32 * zeros.shape[1] // scales.shape[1]
    codes = unpack_codes(packed.T.contiguous(), num_bits).float()
    scale, zero = scales.float().T, unpack_codes(zeros, num_bits).float().T + zero_offset
    columns = codes.shape[1]
    of_column = torch.arange(columns) // (columns // len(scales)) if groups is None else groups.long()
    return (codes - zero[:, of_column]) * scale[:, of_column]
