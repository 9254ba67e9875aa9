"""Makes a bank a folder that vLLM can serve by itself: config, tokenizer and the model's own tensors are beside it."""

import json
import os
import shutil
from pathlib import Path

from allocator.contract.documents import write_atomically
from allocator.contract.safetensors_file import INDEX_NAME
from allocator.inventory import Inventory

__all__ = ["copy_chat_templates", "make_servable"]

_SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_TEMPLATES = "additional_chat_templates"
_NOT_COPIED = {INDEX_NAME, "pytorch_model.bin.index.json", "training.json"}


def make_servable(inventory: Inventory, bank_folder: Path, *, copy: bool = False) -> None:
    """Put the model's config and tokenizer files, links to its safetensors files (`copy`: the files themselves) and
    an index of the tensors that a checkpoint has into `bank_folder`.

    What is there already is replaced.
    """
    bank_folder.mkdir(parents=True, exist_ok=True)
    tensors = (*(module.tensor for module in inventory.modules), *inventory.others)
    for path in sorted({tensor.path for tensor in tensors}):
        target = bank_folder / path.name
        target.unlink(missing_ok=True)
        if copy:
            shutil.copyfile(path, target)
        else:
            os.symlink(path.resolve(), target)
    for path in sorted(inventory.folder.iterdir()):
        if path.is_file() and path.suffix in _SIDE_SUFFIXES and path.name not in _NOT_COPIED:
            shutil.copyfile(path, bank_folder / path.name)
    copy_chat_templates(inventory.folder, bank_folder)
    weight_map = {tensor.name: tensor.path.name for tensor in tensors}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(bank_folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def copy_chat_templates(model: Path, out: Path) -> None:
    """Copy the chat templates that transformers keeps in a folder, those beside the default one, such as `tool_use`."""
    folder = model / _TEMPLATES
    for path in sorted(folder.glob("*.jinja")):
        (out / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, out / _TEMPLATES / path.name)
