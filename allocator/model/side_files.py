"""What becomes of each file of a model folder that holds no weights of the program: carried along, or left out by name.

Which files a tokenizer or custom code reads, no list can say: what is not known to be of no use there is carried.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.bank import BANK_NAME
from allocator.contract.checkpoint import DIGESTS_NAME
from allocator.contract.manifest import MANIFEST_NAME
from allocator.model.inventory import Inventory

__all__ = ["CARRIED_FOLDERS", "SideFiles", "carry", "copy_whole", "side_files"]

_OF_EMBEDDINGS = ("1_Pooling", "2_Dense", "2_Normalize", "3_Dense", "3_Normalize", "4_Normalize")
CARRIED_FOLDERS = ("additional_chat_templates", "custom_generate", *_OF_EMBEDDINGS)
"""Folders of a model folder that transformers reads, and those that vLLM reads of an embedding model: what
sentence-transformers puts behind it, weights of projections among it."""

_WRITTEN_ANEW = {"config.json", MANIFEST_NAME, DIGESTS_NAME, BANK_NAME, "vllm.yaml", "plan.json"}
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot",
    ".npz", ".npy", ".tflite", ".mlmodel", ".engine", ".nemo",
}  # fmt: skip
_DOCUMENTS = {".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".mp4", ".wav"}
_LEGAL = ("license", "licence", "notice", "use_policy", "copying")


@dataclass(frozen=True)
class SideFiles:
    """Files by their path inside the model folder: those carried, and why the others are left out."""

    carried: tuple[str, ...]
    left_out: dict[str, str]

    def told(self) -> list[str]:
        """One line for each reason, with the names."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return [f"left out ({reason}): {', '.join(names)}" for reason, names in reasons.items()]


def side_files(inventory: Inventory) -> SideFiles:
    """Every file of the model's folder but config.json and the weights that the inventory reads."""
    read = {path.name for path in inventory.weight_files}
    carried, left_out = [], {}
    for name, path in _entries(inventory.folder):
        if name in read or name == "config.json":
            continue
        reason = _why_not(path)
        if reason is None:
            carried.append(name)
        else:
            left_out[name] = reason
    return SideFiles(tuple(carried), left_out)


def carry(inventory: Inventory, target: Path) -> None:
    """Copy the files that are carried into the folder `target`, each under its own name."""
    for name in side_files(inventory).carried:
        (target / name).parent.mkdir(exist_ok=True)
        copy_whole(inventory.folder / name, target / name)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file's content; `target` is the old one or the new one, never half of it."""
    temporary = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.name in CARRIED_FOLDERS and path.is_dir():
            yield from ((f"{path.name}/{inner.name}", inner) for inner in sorted(path.iterdir()))
        else:
            yield path.name + ("/" if path.is_dir() else ""), path


def _why_not(path: Path) -> str | None:
    name = path.name.lower()
    if path.is_dir():
        return "a folder that nothing reads"
    if not path.exists():
        return "a link that leads nowhere"
    if name.startswith("."):
        return "hidden"
    if path.name in _WRITTEN_ANEW and path.parent.name not in _OF_EMBEDDINGS:
        return "written anew"
    if name.endswith(".index.json"):
        return "an index of weights"
    if path.suffix.lower() in _WEIGHTS and path.parent.name not in _OF_EMBEDDINGS:
        return "weights that are not the model's own safetensors files"
    if path.name == "training.json":
        return "a record of training"
    if path.suffix.lower() in _DOCUMENTS and not name.startswith(_LEGAL):
        return "documentation"
    return None
