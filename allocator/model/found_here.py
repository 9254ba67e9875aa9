"""Architectures whose structure was found on this machine (`gamma inspect --from-model`), kept in the user's cache."""

import json
import os
import re
from pathlib import Path
from typing import Any

from allocator.contract.documents import parse_json, read_text_limited, write_atomically

__all__ = ["keep_found", "read_found"]

_MAX_BYTES = 16 << 20


def read_found(architecture: str) -> dict[str, Any] | None:
    """The rules of an architecture that were found here, None if none were. Raises ContractError for a damaged file."""
    path = _path(architecture)
    if path is None or not path.exists():
        return None
    document = parse_json(read_text_limited(path, _MAX_BYTES), path)
    rules = document.get("rules") if isinstance(document, dict) else None
    return rules if isinstance(rules, dict) else None


def keep_found(architecture: str, rules: dict[str, Any], versions: dict[str, str]) -> Path:
    """Write the rules where `read_found` finds them; `versions` are those of the libraries that told them."""
    path = _path(architecture)
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**versions, "rules": rules}, indent=1) + "\n")
    return path


def _path(architecture: str) -> Path | None:
    """None for what cannot be a class name, and so no file name either."""
    if not re.fullmatch(r"\w{1,200}", architecture):
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gamma" / "architectures" / f"{architecture}.json"
