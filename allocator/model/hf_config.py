"""config.json of a model: from a folder, from the file itself, or alone from the Hugging Face hub."""

import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from allocator.contract.documents import parse_json, read_text_limited
from allocator.contract.errors import InputError
from allocator.model.other_names import without_head

__all__ = [
    "HUB_SCHEME",
    "find_config",
    "read_config",
    "split_hub",
]

HUB_SCHEME = "hf://"
_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def split_hub(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Id and revision that `model` means; what is no `hf://` is given back as it is.

    Raises InputError for another form, and for two revisions.
    """
    if not model.startswith(HUB_SCHEME):
        return model, revision
    match = _REFERENCE.fullmatch(model.removeprefix(HUB_SCHEME))
    if match is None:
        raise InputError(f"{model}: expected hf://org/name or hf://org/name@revision")
    if revision is not None and match["revision"] not in (None, revision):
        raise InputError(f"{model} names a revision, --revision {revision} another; give one of them")
    return match["id"], match["revision"] or revision


_CONFIG_NAME = "config.json"
_CONFIG_MAX_BYTES = 64 << 20


def find_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The config of `model`: a folder, a config.json, or a hub id (`org/name`, `hf://org/name@revision`), of which only
    that file is fetched.

    Raises InputError when there is none, saying where it was sought.
    """
    model, revision = split_hub(model, revision)
    path = Path(model)
    if path.is_dir():
        return read_config(path)
    if path.is_file():
        return _parsed(path)
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith(".json"):
        raise InputError(f"{model}: no such folder, and no Hugging Face id (org/name) either")
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The client would try again for half a minute where there is no network at all.
    offline = not resolves(constants.ENDPOINT)
    try:
        return _parsed(Path(hf_hub_download(model, _CONFIG_NAME, revision=revision, local_files_only=offline)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{model}: its config.json cannot be downloaded ({reason}); give a local folder, or check id and network"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; an embedding model's names the class without an lm_head (`without_head`).

    Raises InputError when it is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model first, for example with `hf download`")
    if not (folder / _CONFIG_NAME).exists():
        cached = sorted(str(path) for path in folder.glob("snapshots/*/"))
        hint = f": give {' or '.join(cached[:3])}" if cached else "; expected a Hugging Face model folder"
        raise InputError(f"{folder}: no config.json{hint}")
    return without_head(folder, _parsed(folder / _CONFIG_NAME))


def resolves(address: str) -> bool:
    """Whether the host of a URL has an address; a proxy is believed to know it."""
    url = urlsplit(address)
    if url.scheme in getproxies() or url.hostname is None:
        return True
    try:
        socket.getaddrinfo(url.hostname, url.port or 443)
    except OSError:
        return False
    return True


def _parsed(path: Path) -> dict[str, Any]:
    config = parse_json(read_text_limited(path, _CONFIG_MAX_BYTES), path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return config
