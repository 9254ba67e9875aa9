"""Makes a bank a folder that vLLM can serve by itself: config, tokenizer and the model's own tensors are beside it."""

import json
import os
from pathlib import Path

from allocator.contract.documents import write_atomically
from allocator.contract.safetensors_file import INDEX_NAME, copy_renamed
from allocator.inventory import Inventory, carry, copy_whole

__all__ = ["make_servable"]


def make_servable(inventory: Inventory, bank_folder: Path, *, copy: bool = False) -> None:
    """Put the model's config and side files, links to its safetensors files (`copy`: the files themselves) and
    an index of the tensors that a checkpoint has into `bank_folder`.

    What is there already is replaced.
    """
    bank_folder.mkdir(parents=True, exist_ok=True)
    tensors = (*(module.tensor for module in inventory.modules), *inventory.others)
    for path in sorted({tensor.path for tensor in tensors}):
        target = bank_folder / path.name
        target.unlink(missing_ok=True)
        if inventory.prefix is not None:  # a server looks for the architecture's names
            copy_renamed(path, target, inventory.prefix, "lm_head.")
        elif copy:
            copy_whole(path, target)
        else:
            os.symlink(path.resolve(), target)
    copy_whole(inventory.folder / "config.json", bank_folder / "config.json")
    carry(inventory, bank_folder)
    weight_map = {tensor.name: tensor.path.name for tensor in tensors}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(bank_folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
