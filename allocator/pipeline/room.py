"""The room that learning takes on the disk of its work folder, known before it begins."""

import shutil
from collections.abc import Mapping, Sequence

from allocator.blocks.side_states import state_width
from allocator.contract.bank import candidate_tensors
from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.safetensors_file import predict_file_bytes
from allocator.model import Inventory, side_files
from allocator.run.work_folder import WorkFolder
from allocator.score import LearningSettings

__all__ = ["bank_bytes", "check_room", "learning_bytes"]

_DISK_BLOCK_BYTES = 4096


def bank_bytes(inventory: Inventory, formats: Mapping[str, Sequence[ModuleFormat]]) -> int:
    """Bytes of the bank's files on a disk: candidates with their headers, side files, links."""
    tensors = [[t for f in of for t in candidate_tensors(f, inventory.dtype)] for of in formats.values() if of]
    sizes = [predict_file_bytes(of_module) for of_module in tensors]
    if inventory.prefix is not None:  # with other names the model's files cannot be links
        sizes += [path.stat().st_size for path in {module.tensor.path for module in inventory.modules}]
    sizes += [(inventory.folder / name).stat().st_size for name in side_files(inventory).carried]
    return sum(-(-size // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES for size in sizes)


def learning_bytes(
    inventory: Inventory, formats: Mapping[str, Sequence[ModuleFormat]], tokens: int, learning: LearningSettings
) -> int:
    """Bytes of the hidden states of `tokens`, of gradients, and of what the journal and the scores keep of errors."""
    # Of gradients, which take half of what states take, two boundaries a draw are there at a time.
    states = 4 * tokens * state_width(inventory) * (inventory.blocks + 1 + learning.draws)
    candidates = sum(map(len, formats.values()))
    errors = 2 * candidates * min(tokens * learning.draws, learning.pair_samples)
    # A file a module in the bank's journal, and what frames its errors among those measured, which is less.
    small = _DISK_BLOCK_BYTES * (2 * len(formats) + 3 * (inventory.blocks + 1))
    return states + errors + 4 * candidates**2 // 3 + small


def check_room(folder: WorkFolder, needed: int) -> None:
    """Raises InputError if hidden states and bank cannot grow to `needed` bytes on the disk of the work folder."""
    files = [path for name in ("bank", "hidden", "journal") for path in (folder.folder / name).rglob("*")]
    # The model's own files are links in the bank, which take no room there.
    there = sum(path.lstat().st_blocks * 512 for path in files if path.is_file() and not path.is_symlink())
    free = shutil.disk_usage(folder.folder).free
    if free + there < needed:
        raise InputError(
            f"{folder.folder} has {free:,} bytes free; candidates and the hidden states of the calibration text need "
            f"{needed - there:,} more: use a larger disk, or fewer or shorter --sequences"
        )
