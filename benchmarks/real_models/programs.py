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
        model = bench.load(bench.folder)
        state = dict(unpacked(checkpoint, {k: tuple(v.shape) for k, v in model.state_dict().items()}, zero_offset))
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        more = {"rival": rival, **settings}
        return Quantized(model, folder_sizes(bench, checkpoint), Cost(**kept["cost"]), more)

    bench.cell(name, make, digest_bytes(json.dumps(settings, sort_keys=True).encode()))


def _digest(token_ids: Tensor) -> str:
    return digest_bytes(token_ids.contiguous().numpy().tobytes())


def unpacked(folder: Path, shapes: dict[str, tuple[int, ...]], zero_offset: int = 0) -> Iterator[tuple[str, Any]]:
    """Name and float32 weight of every tensor of a checkpoint with `qweight`, `qzeros` and `scales`.

    shapes: of the model's weights by name; zero_offset: what is added to stored zero points (1 in GPTQ's first format).
    """
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
            zeros = unpack_codes(stored[f"{stem}.qzeros"], num_bits).float().T + zero_offset
            groups = _groups(stored.get(f"{stem}.g_idx"), columns, scales.shape[1])
            weight = ((codes - zeros[:, groups]) * scales[:, groups]).reshape(rows, columns)
            yield f"{stem}.weight", torch.nn.Parameter(weight, requires_grad=False)
        elif kind not in ("scales", "qzeros", "g_idx"):
            yield name, torch.nn.Parameter(tensor.float(), requires_grad=False)


def _groups(stored: Tensor | None, columns: int, count: int) -> Tensor:
    """Of each column its group: as it is stored, else one after the other."""
    return torch.arange(columns) // (columns // count) if stored is None else stored.long()
