"""Safetensors files without weights: read and check headers, predict the exact bytes of a file to be written."""

import json
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allocator.contract.documents import parse_json, read_text_limited
from allocator.contract.errors import ContractError
from allocator.contract.layout import DTYPE_BYTES, TensorSpec

__all__ = [
    "INDEX_NAME",
    "StoredTensor",
    "copy_renamed",
    "header_bytes",
    "predict_file_bytes",
    "read_folder_headers",
    "read_header",
    "serialized_order",
]

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: where its bytes are (`start` counts from the start of the file).

    `stored_as` is its name in the file where that is another one.
    """

    path: Path
    start: int
    stored_as: str | None = field(default=None, kw_only=True)

    @property
    def in_files(self) -> tuple["StoredTensor", ...]:
        """The tensors of the files that it is made of: itself, unless it is dequantized or cut out on reading."""
        return (self,)


def serialized_order(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which the safetensors library lays tensors out: highest dtype rank first, then by name."""
    rank = {dtype: -position for position, dtype in enumerate(DTYPE_BYTES)}
    return sorted(tensors, key=lambda t: (rank[t.dtype], t.name))


def header_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Bytes before the data: the 8-byte length and the JSON header padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    offset = 0
    for tensor in serialized_order(tensors):
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8


def predict_file_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Exact size of the safetensors file that holds `tensors` (metadata `{"format": "pt"}`)."""
    return header_bytes(tensors) + sum(t.nbytes for t in tensors)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read one file's header and check it against the file's size; no weights are read.

    Raises ContractError when the file is absent, cut short, has holes or overlaps, or names an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ContractError(
                    f"{path}: {size} bytes are too few for its header; the file is cut short or damaged"
                )
            text = file.read(length).decode("utf-8")
    except FileNotFoundError:
        raise ContractError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: cannot be read ({error})") from None
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise ContractError(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, entry, path, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != position:
            raise ContractError(f"{path}: tensor {tensor.name} starts at byte {tensor.start}, expected {position}")
        position += tensor.nbytes
    if position != size:
        raise ContractError(f"{path}: {size} bytes, its header says {position}; the file is cut short or damaged")
    return tensors


def copy_renamed(source: Path, target: Path, prefix: str, unchanged: tuple[str, ...]) -> None:
    """Copy a safetensors file with `prefix` before the name of each tensor that does not begin with one of `unchanged`.

    `target` appears as a whole.
    """
    temporary = target.with_name(f".{target.name}.part")
    try:
        with source.open("rb") as reader, temporary.open("wb") as writer:
            entries = json.loads(reader.read(struct.unpack("<Q", reader.read(8))[0]))
            kept = (*unchanged, "__metadata__")
            header = {name if name.startswith(kept) else prefix + name: entry for name, entry in entries.items()}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            writer.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(reader, writer, 1 << 22)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _stored(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        tensor = StoredTensor(name, dtype, shape, path, data_start + start)
        whole = all(type(d) is int and d >= 0 for d in (*shape, start, end))
        sound = whole and dtype in DTYPE_BYTES and end - start == tensor.nbytes
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise ContractError(f"{path}: the header entry of tensor {name} is not valid: {str(entry)[:120]}")
    return tensor


def read_folder_headers(folder: Path, unindexed: Sequence[Path] | None = None) -> dict[str, StoredTensor]:
    """Headers of all safetensors files of a Hugging Face model folder, following the index where there is one.

    `unindexed` are the files to read where there is none (default: all).

    Raises ContractError when a file of the index is missing, a tensor stands in two files, or there is none.
    """
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = _read_weight_map(index)
        files = sorted({folder / name for name in weight_map.values()})
    else:
        weight_map = None
        files = sorted(folder.glob("*.safetensors") if unindexed is None else unindexed)
    if not files:
        raise ContractError(f"{folder}: no safetensors files; expected model.safetensors or {INDEX_NAME}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ContractError(f"{folder}: tensor {name} stands in {tensors[name].path.name} and {file.name}")
            tensors[name] = tensor
    if weight_map is not None and set(weight_map) != set(tensors):
        odd = sorted(set(weight_map) ^ set(tensors))[0]
        raise ContractError(f"{index}: tensor {odd} is in the index or in the files, but not in both")
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name. A file name with a folder in it is refused: it would lead out of the model."""
    document = parse_json(read_text_limited(index, _MAX_HEADER_BYTES), index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise ContractError(f"{index}: no weight_map; the index is damaged")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ContractError(f"{index}: tensor {tensor} is said to be in {file!r}, which is no file name")
    return weight_map
