"""The model digest remembered, so that the weights are not read again at every step: 64 GB take minutes.

It is trusted only where nothing differs: config.json, the headers, and of each file its size, inode, and times of
modification and change to the nanosecond. A file that changed less than two seconds before it was read may change
again within the same tick of a coarse clock, and is not remembered.
"""

import time
from pathlib import Path
from typing import ClassVar

from allocator.contract.digest import digest_json
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.errors import ContractError
from allocator.inventory.digest import BytesRead, model_digest
from allocator.inventory.inventory import Inventory

__all__ = ["DIGEST_CACHE_NAME", "cached_model_digest"]

DIGEST_CACHE_NAME = "model-digest.json"

_SETTLED_NANOSECONDS = 2_000_000_000


class _FileIdentity(Strict):
    """What the file system says of one file."""

    path: str
    size: int
    inode: int
    modified_ns: int
    changed_ns: int


class _RememberedDigest(Document):
    """The digest of a model and what it was read from."""

    SCHEMA: ClassVar[str] = "gamma.model-digest"

    model_digest: Digest
    headers: Digest
    files: list[_FileIdentity]


def cached_model_digest(inventory: Inventory, cache: Path, progress: BytesRead | None = None) -> str:
    """`model_digest`, from the file `cache` if it was computed from these very files; else computed and kept there."""
    headers, files, now = _headers(inventory), _files(inventory), time.time_ns()
    try:
        known = _RememberedDigest.read(cache)
        if (known.headers, known.files) == (headers, files):
            return known.model_digest
    except ContractError:
        pass  # absent, damaged or of another release: computed anew
    digest = model_digest(inventory, progress)
    settled = all(now - max(f.modified_ns, f.changed_ns) > _SETTLED_NANOSECONDS for f in files)
    if settled and _files(inventory) == files:
        _RememberedDigest(model_digest=digest, headers=headers, files=files).write(cache)
    return digest


def _headers(inventory: Inventory) -> str:
    tensors = [*(m.tensor for m in inventory.modules), *inventory.others]
    entries = sorted([t.name, t.dtype, list(t.shape), str(t.path.resolve()), t.start] for t in tensors)
    return digest_json({"config": inventory.config, "tensors": entries})


def _files(inventory: Inventory) -> list[_FileIdentity]:
    tensors = [*(m.tensor for m in inventory.modules), *inventory.others]
    found = []
    for path in sorted({t.path.resolve() for t in tensors}):
        status = path.stat()
        found.append(
            _FileIdentity(
                path=str(path),
                size=status.st_size,
                inode=status.st_ino,
                modified_ns=status.st_mtime_ns,
                changed_ns=status.st_ctime_ns,
            )
        )
    return found
