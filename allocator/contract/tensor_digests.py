"""Content digests of a checkpoint's tensors: recorded when it is written, compared on request."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from allocator.contract.documents import Digest, Document
from allocator.contract.errors import ContractError
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import StoredTensor, read_folder_headers

__all__ = ["DIGESTS_NAME", "TensorDigests", "check_digests", "digest_folder"]

DIGESTS_NAME = "gamma_digests.json"

_CHUNK_BYTES = 1 << 22


class TensorDigests(Document):
    """`gamma_digests.json` in a checkpoint: SHA-256 of the bytes of every tensor, by its name."""

    SCHEMA: ClassVar[str] = "gamma.digests"

    manifest_digest: Digest
    tensors: dict[str, Digest] = Field(min_length=1)


def digest_folder(folder: Path, manifest: Manifest) -> TensorDigests:
    """Read every tensor of a checkpoint folder and digest it."""
    tensors = {name: _digest(tensor) for name, tensor in sorted(read_folder_headers(folder).items())}
    return TensorDigests(manifest_digest=manifest.digest, tensors=tensors)


def check_digests(
    folder: Path, manifest: Manifest, told: Callable[[int, int], None] = lambda _done, _total: None
) -> int:
    """Compare every tensor with what was recorded; returns how many there are. `told` is given the bytes that are read
    and those in all after each.

    Raises ContractError naming the first tensor that differs, with both digests.
    """
    path = folder / DIGESTS_NAME
    if not path.exists():
        raise ContractError(f"{path}: no such file; digests are written by `gamma export`, export the checkpoint again")
    recorded = TensorDigests.read(path)
    if recorded.manifest_digest != manifest.digest:
        raise ContractError(
            f"{path} was written for manifest {recorded.manifest_digest}, the checkpoint's is {manifest.digest}; "
            "export it again"
        )
    stored = read_folder_headers(folder)
    if stored.keys() != recorded.tensors.keys():
        odd = sorted(stored.keys() ^ recorded.tensors.keys())[0]
        raise ContractError(f"{folder}: tensor {odd} is in the files or in {DIGESTS_NAME}, but not in both")
    done, total = 0, sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        found = _digest(tensor)
        done += tensor.nbytes
        told(done, total)
        if found != recorded.tensors[name]:
            raise ContractError(
                f"{tensor.path}: tensor {name} is {found}, {DIGESTS_NAME} says {recorded.tensors[name]}; "
                "it was changed or damaged after the export"
            )
    return len(stored)


def _digest(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ContractError(f"{tensor.path}: tensor {tensor.name} is cut short")
            digest.update(chunk)
            left -= len(chunk)
    return "sha256:" + digest.hexdigest()
