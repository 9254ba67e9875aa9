"""Brings a work folder of `gamma learn` into a store: scores, bank, and where the model lies; and manifests."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from allocator.contract.bank import BANK_NAME, Bank
from allocator.contract.digest import digest_file
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import INDEX_NAME
from allocator.contract.scores import KV_CACHE_NAME, KvCacheScores, Scores
from allocator.model import Inventory, model_digest, read_inventory, side_files
from allocator.run.progress import Progress, silent
from allocator.sidecar.store import Entry, Source, Store, hex_of
from allocator.solve.kv_cache_dtype import check_kv_scores
from allocator.solve.predicted import single_losses

__all__ = ["Published", "publish", "publish_manifest"]

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Published:
    """The entry, and how many bytes were written (0: everything was there)."""

    entry: Entry
    written_bytes: int


def publish(
    work: Path,
    model: Path,
    store: Store,
    source: Source,
    name: str | None = None,
    progress: Progress = silent,
) -> Published:
    """Add `work` (scores.json, bank/, kv_cache.json if it is there) to `store`. `model` is the folder of the model that
    it was learned from.

    With a source of kind "store" the model's files are added too. What the store has is not written again. The
    entry is written last, so an interrupted call leaves nothing on offer that is not whole. Raises ContractError
    when scores, bank and model do not belong together.
    """
    scores = Scores.read(work / "scores.json")
    bank_folder = work / "bank"
    bank = Bank.read(bank_folder / BANK_NAME)
    if scores.bank_digest != bank.digest or scores.model != bank.model:
        raise ContractError(
            f"{work}: the scores are of bank {scores.bank_digest}, the bank is {bank.digest}; run `gamma learn` again"
        )
    inventory = read_inventory(model)
    digest = model_digest(inventory, progress.bytes_of("reading the model"))
    if digest != scores.model.digest:
        raise ContractError(
            f"{work} was learned from model {scores.model.digest}, {model} is {digest}; give that model"
        )
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", scores.model.name).strip("-._")[:128] or "model"
    if _FILE_NAME.fullmatch(name) is None or len(name) > 128:
        raise InputError(f"name {name!r}: allowed are letters, digits, dots, dashes and underscores, at most 128")

    store.check_conditions()
    written = _add_bank(store, bank_folder, bank, progress)
    if source.kind == "store":
        written += _add_source(store, inventory, digest, progress)
    store.add_scores(scores)
    if (work / KV_CACHE_NAME).exists():
        measured = KvCacheScores.read(work / KV_CACHE_NAME)
        check_kv_scores(measured, scores)
        store.add_kv_cache(measured)
    low, high = scores.feasible_bytes()
    entry = Entry(
        name=name,
        model=scores.model,
        config=inventory.config,
        source=source,
        scores_digest=scores.digest,
        bank_digest=bank.digest,
        method=scores.method,
        unit=scores.unit,
        quantizer=bank.quantizer,
        group_size=bank.group_size,
        symmetric=bank.symmetric,
        widths=sorted({c.format.num_bits for m in scores.modules.values() for c in m.candidates}),
        modules=len(scores.modules),
        feasible_bytes=(low, high),
        added=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    store.add_entry(entry)
    return Published(entry, written)


def publish_manifest(manifest: Manifest, store: Store) -> bool:
    """Add a manifest to the store that has its scores: to be served by digest, and for the loss that it records.

    False if it was there already. Raises InputError when the store has no such scores, ContractError when scores and
    manifest do not belong together.
    """
    scores = None if manifest.scores_digest is None else store.scores(manifest.scores_digest)
    if scores is None:
        offers = ", ".join(sorted({e.name for e in store.entries()})) or "nothing"
        raise InputError(
            f"manifest {manifest.digest} was solved from scores {manifest.scores_digest or '(not recorded)'}, which "
            f"{store.url} does not have (it offers {offers}); add the work folder that they are from first"
        )
    of_scores = scores.model.digest, scores.bank_digest, scores.other_bytes, set(scores.modules)
    if of_scores != (manifest.model.digest, manifest.bank_digest, manifest.other_bytes, set(manifest.modules)):
        raise ContractError(f"manifest {manifest.digest} is not of the model and bank of its scores; solve it again")
    single_losses(scores, manifest.modules)
    return store.add_manifest(manifest)


def _add_bank(store: Store, folder: Path, bank: Bank, progress: Progress) -> int:
    at, written = f"banks/{hex_of(bank.digest)}", 0
    if store.backend.exists(f"{at}/{BANK_NAME}"):
        return 0
    for name, module in progress.over(bank.modules.items(), "copying the bank", "module"):
        path = folder / module.file
        if _FILE_NAME.fullmatch(module.file) is None:
            raise ContractError(f"{folder}: {module.file!r} is no name of a bank file")
        found = digest_file(path) if path.is_file() else "missing"
        if found != module.file_digest:
            raise ContractError(f"{path}: content of {name} is {found}, {BANK_NAME} says {module.file_digest}")
        store.backend.upload(path, f"{at}/{module.file}")
        written += path.stat().st_size
    store.backend.upload(folder / BANK_NAME, f"{at}/{BANK_NAME}")
    return written + (folder / BANK_NAME).stat().st_size


def _add_source(store: Store, inventory: Inventory, digest: str, progress: Progress) -> int:
    """config.json is written last: without it a source is unfinished."""
    at, written = f"sources/{hex_of(digest)}", 0
    if store.backend.exists(f"{at}/config.json"):
        return 0
    weights = {path.name for path in inventory.weight_files}
    index = [INDEX_NAME] if (inventory.folder / INDEX_NAME).exists() else []
    names = [*sorted(weights), *index, *side_files(inventory).carried, "config.json"]
    total = sum((inventory.folder / name).stat().st_size for name in names)
    tell = progress.bytes_of("copying the model")
    for name in names:
        path = inventory.folder / name
        if any(_FILE_NAME.fullmatch(part) is None for part in name.split("/")):
            raise InputError(f"{path}: the store takes names of letters, digits, dots, dashes and underscores only")
        store.backend.upload(path, f"{at}/{name}")
        written += path.stat().st_size
        tell(written, total)
    return written
