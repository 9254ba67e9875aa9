"""Content digests: of JSON documents, of tensors, of files and of a whole model."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["digest_bytes", "digest_file", "digest_json", "digest_model"]

_CHUNK_BYTES = 1 << 22


def digest_bytes(content: bytes | memoryview) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def digest_json(document: Any) -> str:
    """Digest of the canonical form: keys sorted, no spaces, so that formatting does not count."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return digest_bytes(canonical.encode())


def digest_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def digest_model(tensors: Iterable[tuple[str, str, tuple[int, ...], str]], config: Mapping[str, Any]) -> str:
    """Digest over (name, dtype, shape, content digest) of every tensor, in name order, and the config.

    How a model is cut into files does not count; any changed weight, or a changed config.json, does.
    """
    lines = sorted([name, dtype, list(shape), content] for name, dtype, shape, content in tensors)
    return digest_json({"config": dict(config), "tensors": lines})
