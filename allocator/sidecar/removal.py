"""Takes a model off a store: its entry, and what nothing else in the store needs then."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from allocator.contract.bank import BANK_NAME
from allocator.contract.errors import InputError
from allocator.sidecar.job_files import JobFiles, Owner
from allocator.sidecar.store import Entry, Store, hex_of

__all__ = ["Removal", "plan_removal", "remove"]


@dataclass(frozen=True)
class Removal:
    """What goes, as paths in the order in which they are deleted with their bytes; what stays, with the reason."""

    paths: dict[str, int]
    kept: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(self.paths.values())


def plan_removal(store: Store, which: str) -> Removal:
    """What `gamma store remove` of a name, or of the digest of scores or of a model, would delete.

    Scores, bank, 16-bit model and measured KV cache go with the last entry that needs them; manifests and allocations
    with the bank that they are of. While an entry cannot be read nobody knows what it needs: then only the entry
    goes. The digest of its scores takes the unreadable entry itself away. Jobs and checkpoints stay. Raises
    InputError when the store has no such entry.
    """
    listing = store.listing()
    files = {path: e for path, e in listing.files.items() if which in (e.name, e.scores_digest, e.model.digest)}
    broken = [path for path in listing.unreadable if _is_of(path, which)]
    if not files and not broken:
        offers = ", ".join(sorted({e.name for e in listing.entries})) or "nothing"
        raise InputError(f"{store.url} has no entry {which!r}; it offers {offers}")
    going = list(files.values())
    staying = [e for path, e in listing.files.items() if path not in files]
    unknown = [path for path in listing.unreadable if path not in broken]
    found = _Found(store, {}, {})
    for path in [*files, *broken]:
        found.take(path)
    for digest in _unneeded(found, "scores", going, staying, unknown, lambda e: e.scores_digest):
        found.take(f"scores/{hex_of(digest)}.json")
        found.take_all(f"measured/{hex_of(digest)}")
    banks = _unneeded(found, "bank", going, staying, unknown, lambda e: e.bank_digest)
    for digest in banks:
        found.take_all(f"banks/{hex_of(digest)}", first=BANK_NAME)
    for digest in _unneeded(found, "model", going, staying, unknown, lambda e: e.model.digest):
        found.take_all(f"sources/{hex_of(digest)}", first="config.json")
        found.take(f"kv_cache/{hex_of(digest)}.json")
    if banks:
        _refuse_while_made(store, _manifests(found, set(banks)))
    return Removal(found.paths, found.kept)


def remove(store: Store, removal: Removal) -> None:
    """Delete what `plan_removal` found: entries first, then what they name, so that what is on offer stays whole."""
    for path in removal.paths:
        store.backend.delete(path)


@dataclass
class _Found:
    store: Store
    paths: dict[str, int]
    kept: dict[str, str]

    def take(self, path: str) -> None:
        if self.store.backend.exists(path):
            self.paths[path] = self.store.backend.size(path)

    def take_all(self, folder: str, first: str = "") -> None:
        """Every object of `folder`; the one that makes it whole goes first."""
        names = self.store.backend.names(folder)
        for name in sorted(names, key=lambda name: (name != first, name)):
            self.take(f"{folder}/{name}")


def _unneeded(
    found: _Found, what: str, going: list[Entry], staying: list[Entry], unknown: list[str], of: Callable[[Entry], str]
) -> list[str]:
    """The digests that nothing needs any more; the others are noted as kept."""
    rest = []
    for digest in sorted({of(e) for e in going}):
        names = sorted({e.name for e in staying if of(e) == digest})
        if names:
            found.kept[f"{what} {digest}"] = f"{', '.join(names)} needs it"
        elif unknown:
            found.kept[f"{what} {digest}"] = f"{unknown[0]} cannot be read and may need it"
        else:
            rest.append(digest)
    return rest


def _manifests(found: _Found, banks: set[str]) -> set[str]:
    """Manifests of the banks that go, of which nothing can be made any more, and the allocations that name them."""
    backend, gone = found.store.backend, set()
    for name in backend.names("manifests"):
        document = _document(found.store, f"manifests/{name}")
        if document.get("bank_digest") in banks:
            found.take(f"manifests/{name}")
            gone.add(f"sha256:{name.removesuffix('.json')}")
    for name in backend.names("allocations"):
        if _document(found.store, f"allocations/{name}").get("manifest_digest") in gone:
            found.take(f"allocations/{name}")
    return gone


def _refuse_while_made(store: Store, manifests: set[str]) -> None:
    files = JobFiles(store, Owner.me())
    for record in filter(None, map(files.read, files.ids())):
        if record.request.manifest in manifests and record.job.state in ("queued", "running"):
            raise InputError(
                f"job {record.job.id} is making a checkpoint from what would be removed; wait for it, or cancel it"
            )


def _document(store: Store, path: str) -> dict[str, object]:
    try:
        content = json.loads(store.backend.read(path) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_of(path: str, which: str) -> bool:
    try:
        return path.startswith(f"entries/{hex_of(which)}.")
    except ValueError:
        return path.endswith(f".{which}.json")
