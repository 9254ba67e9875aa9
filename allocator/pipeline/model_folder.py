"""The model as it was named: its folder, and its digest, which a work folder remembers."""

from pathlib import Path

from allocator.contract.bank import ModelReference
from allocator.contract.errors import InputError
from allocator.model import DIGEST_CACHE_NAME, Inventory, cached_model_digest, model_digest
from allocator.model.hf_config import split_hub
from allocator.run.progress import Progress

__all__ = ["digest_of_model", "name_of_model", "reference_to", "resolve_model", "work_folder_at"]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """A local model folder: `model` itself, or the download of a hub id (`org/name`, `hf://org/name@revision`)."""
    model, revision = split_hub(model, revision)
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(f"{model}: no such folder, and no Hugging Face id (org/name) either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{model}: cannot be downloaded ({reason}); give a local folder, or check id and network"
        ) from None


def name_of_model(folder: Path) -> str:
    """What the model in `folder` is called: the folder, or in the hub's cache the end of the id, not the commit."""
    folder = folder.resolve()
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.rpartition("--")[2]
    return folder.name


def digest_of_model(inventory: Inventory, work: Path | None, progress: Progress) -> str:
    """The digest of the model, remembered in the work folder `work` (None: nowhere)."""
    tell = progress.bytes_of("reading the model")
    if work is None:
        return model_digest(inventory, tell)
    return cached_model_digest(inventory, work / DIGEST_CACHE_NAME, tell)


def reference_to(inventory: Inventory, digest: str) -> ModelReference:
    """What documents call the model."""
    return ModelReference(
        name=name_of_model(inventory.folder),
        architecture=inventory.architecture,
        digest=digest,
        quantized_by=None if inventory.source is None else inventory.source.method,
    )


def work_folder_at(folder: Path) -> Path | None:
    """`folder` if something was learned there: then it may remember the digest."""
    return folder if (folder / DIGEST_CACHE_NAME).exists() else None
