"""Scores to share: an entry of a store with all that a new budget needs, in a hub repository or an OCI registry.

Whoever pulls it solves for budgets of their own and never learns that model. `Share` lists the files with their
digests; they have the paths that they have in a store.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import Field, model_validator

from allocator.contract.bank import BANK_NAME, Bank
from allocator.contract.digest import digest_bytes, digest_file
from allocator.contract.documents import Digest, Document, Strict, parse_json
from allocator.contract.errors import ContractError, GammaError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import KvCacheScores, Scores
from allocator.model import CARRIED_FOLDERS
from allocator.run.progress import Progress, silent
from allocator.sidecar.backends import StoreUnreachableError
from allocator.sidecar.choice import find_entry
from allocator.sidecar.publish import publish_manifest
from allocator.sidecar.store import Entry, Source, Store, hex_of
from allocator.solve.kv_cache_dtype import check_kv_scores

__all__ = ["SHARE_NAME", "LocalFile", "Pulled", "Remote", "Share", "SharedFile", "pull", "push", "reaching"]

SHARE_NAME = "gamma_share.json"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HEX = r"[0-9a-f]{64}"


class SharedFile(Strict):
    """A file by its path in a store."""

    path: str
    digest: Digest
    nbytes: int = Field(ge=0)


class Share(Document):
    """`gamma_share.json`. Its files are those of `entry` and no others, so that a pull writes nowhere else."""

    SCHEMA: ClassVar[str] = "gamma.share"

    entry: Entry
    files: list[SharedFile]

    @model_validator(mode="after")
    def _of_the_entry(self) -> "Share":
        e = self.entry
        scores, bank, model = map(hex_of, (e.scores_digest, e.bank_digest, e.model.digest))
        allowed = re.compile(
            rf"scores/{scores}\.json|kv_cache/{model}\.json|manifests/{_HEX}\.json|banks/{bank}/{_NAME}"
            rf"|sources/{model}/({_NAME}/)?{_NAME}"
        )
        paths = [file.path for file in self.files]
        strange = [path for path in paths if allowed.fullmatch(path) is None]
        if strange or len(set(paths)) != len(paths) or f"scores/{scores}.json" not in paths:
            raise ValueError(f"files are not those of the scores {e.scores_digest}: {(strange or paths)[:3]}")
        return self

    def under(self, folder: str) -> list[SharedFile]:
        return [file for file in self.files if file.path.startswith(f"{folder}/")]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


LocalFile = Callable[[SharedFile], AbstractContextManager[Path]]


class Remote(Protocol):
    """A place of shares by its address, `hf://owner/name@revision` or `oci://host/name:tag`.

    All raise InputError for what is not there or refused, StoreUnreachableError for what does not answer.
    """

    address: str

    def read(self) -> bytes:
        """The content of `gamma_share.json`."""

    def fetch(self, file: SharedFile, target: Path, tell: Callable[[int], None]) -> None:
        """Write the file to `target`, going on from the part that an earlier call left. `tell` gets bytes as they come.

        The content is checked by the caller.
        """

    def push(self, share: Share, local: LocalFile, tell: Callable[[int], None]) -> str:
        """Write all that is not there yet, the list last. Returns the address of exactly this content."""


@dataclass(frozen=True)
class Pulled:
    """The entry as it is on offer now, and the bytes that came for it (0: all was there)."""

    entry: Entry
    fetched_bytes: int


def push(
    store: Store,
    which: str,
    remote: Remote,
    source: Source | None = None,
    scores_only: bool = False,
    progress: Progress = silent,
) -> tuple[Share, str]:
    """Bring an entry of `store` to `remote`; the share and the address of exactly it.

    With it go its scores, what an fp8 KV cache costs, the manifests that say what was measured and, unless
    `scores_only`, the bank, and the 16-bit model if the store has a copy. `source` says where others find the model.
    Raises InputError when nobody else could find it.
    """
    entry = find_entry(store, which)
    files = [*_documents(store, entry)]
    if scores_only:
        source = source or (Source(kind="store") if entry.source.kind == "folder" else entry.source)
    else:
        files += _bank_files(store, entry)
        source = source or entry.source
        if source.kind == "folder":
            raise InputError(
                f"{entry.name} was learned from the folder {source.location}, which others do not have: say where they "
                "find it with --model hf://org/name@revision, add the model to the store (gamma store add "
                "--copy-model), or push --scores-only"
            )
        if source.kind == "store":
            files += _source_files(store, entry, progress)
    share = Share(entry=entry.model_copy(update={"source": source}), files=files)
    with _local(store) as local:
        address = remote.push(share, local, _telling(progress, "pushing", share.nbytes))
    return share, address


def pull(
    remote: Remote,
    store: Store,
    name: str | None = None,
    source: Source | None = None,
    scores_only: bool = False,
    progress: Progress = silent,
) -> Pulled:
    """Offer in `store` what `remote` shares, under its name or another. `source`: where the 16-bit model is here.

    Every file is compared with its digest before it reaches the store, the entry is written last. What the store has is
    not fetched; what was cut off goes on where it was. Raises ContractError for what does not belong together.
    """
    share = Share.parse(parse_json(_text(remote), remote.address), remote.address)
    entry = share.entry
    bank, model = f"banks/{hex_of(entry.bank_digest)}", f"sources/{hex_of(entry.model.digest)}"
    wanted = [f for f in share.files if not scores_only or not f.path.startswith((f"{bank}/", f"{model}/"))]
    for at, last in ((bank, BANK_NAME), (model, "config.json")):
        if store.backend.exists(f"{at}/{last}"):  # written last: all is there
            wanted = [f for f in wanted if not f.path.startswith(f"{at}/")]
    store.check_conditions()
    with _scratch(store) as folder:
        incoming = _Incoming(remote, share, store, folder, _telling(progress, "pulling", sum(f.nbytes for f in wanted)))
        # Scores and the list of the bank first: what does not belong together is refused before much has come.
        incoming.documents(wanted)
        for file in wanted:
            if file.path.startswith((f"{bank}/", f"{model}/")) and not _is_last(file.path):
                incoming.store(file)
        for file in filter(lambda f: _is_last(f.path), wanted):
            incoming.store(file)
    update = {"source": source, "name": name}
    offered = Entry.model_validate(
        entry.model_dump() | {key: value for key, value in update.items() if value is not None}
    )
    if offered not in store.entries():
        store.add_entry(offered)
    return Pulled(offered, incoming.fetched)


class _Incoming:
    """Fetches files, compares them with their digests, and hands them to the store."""

    def __init__(self, remote: Remote, share: Share, store: Store, folder: Path, tell: Callable[[int], None]) -> None:
        self.remote, self.share, self.into, self.folder, self.tell = remote, share, store, folder, tell
        self.fetched = 0

    def documents(self, wanted: list[SharedFile]) -> None:
        """Scores, bank.json, kv_cache and manifests: parsed, and compared with what they are said to be."""
        entry, where = self.share.entry, self.remote.address
        (scores_file,) = self.share.under("scores")
        scores = self.into.scores(entry.scores_digest) or Scores.read(self.file(scores_file))
        widths = sorted({c.format.num_bits for m in scores.modules.values() for c in m.candidates})
        claimed = (entry.scores_digest, entry.model, entry.bank_digest, entry.method, entry.unit, entry.widths)
        if (scores.digest, scores.model, scores.bank_digest, scores.method, scores.unit, widths) != claimed:
            raise ContractError(
                f"{where}: its scores are not those that {SHARE_NAME} describes; it was put together wrong"
            )
        for file in wanted:
            if file.path.endswith(f"/{BANK_NAME}") and file.path.startswith("banks/"):
                self._check_bank(Bank.read(self.file(file)))
        self.into.add_scores(scores)
        for file in wanted:
            if file.path.startswith("kv_cache/"):
                measured = KvCacheScores.read(self.file(file))
                check_kv_scores(measured, scores)
                self.into.add_kv_cache(measured)
            elif file.path.startswith("manifests/"):
                manifest = Manifest.read(self.file(file))
                if file.path != f"manifests/{hex_of(manifest.digest)}.json":
                    raise ContractError(f"{where}: {file.path} holds manifest {manifest.digest}")
                publish_manifest(manifest, self.into)

    def _check_bank(self, bank: Bank) -> None:
        entry, where = self.share.entry, self.remote.address
        listed = {f.path.rpartition("/")[2]: f.digest for f in self.share.under("banks")}
        if bank.digest != entry.bank_digest:
            raise ContractError(f"{where}: {BANK_NAME} is of bank {bank.digest}, the scores are of {entry.bank_digest}")
        for name, module in bank.modules.items():
            if listed.get(module.file) != module.file_digest:
                raise ContractError(f"{where}: the file of {name} is missing, or another than {BANK_NAME} says")

    def store(self, file: SharedFile) -> None:
        if self.into.backend.exists(file.path) and self.into.backend.size(file.path) == file.nbytes:
            self.tell(file.nbytes)
            return
        path = self.file(file)
        self.into.backend.upload(path, file.path)
        path.unlink()

    def file(self, file: SharedFile) -> Path:
        """The file here, whole and checked."""
        target = self.folder / hex_of(file.digest)
        if target.exists():
            return target
        part = target.with_suffix(".part")
        self.remote.fetch(file, part, self.tell)
        self.fetched += file.nbytes
        found, nbytes = digest_file(part), part.stat().st_size
        if (found, nbytes) != (file.digest, file.nbytes):
            part.unlink()
            raise ContractError(
                f"{self.remote.address}: {file.path} came as {nbytes} bytes of {found}, {SHARE_NAME} says "
                f"{file.nbytes} of {file.digest}; it was not taken. Pull again; if it stays so, it must be pushed anew"
            )
        os.replace(part, target)
        return target


def _is_last(path: str) -> bool:
    """Without this file a bank or a model is unfinished."""
    return re.fullmatch(rf"(banks/{_HEX}/bank|sources/{_HEX}/config)\.json", path) is not None


def _text(remote: Remote) -> str:
    content = remote.read()
    if len(content) > Share.MAX_BYTES:
        raise ContractError(f"{remote.address}: {SHARE_NAME} has {len(content)} bytes, allowed are {Share.MAX_BYTES}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ContractError(f"{remote.address}: {SHARE_NAME} is not valid JSON ({error})") from None


def _documents(store: Store, entry: Entry) -> Iterator[SharedFile]:
    paths = [f"scores/{hex_of(entry.scores_digest)}.json", f"kv_cache/{hex_of(entry.model.digest)}.json"]
    paths += [f"manifests/{hex_of(digest)}.json" for digest in store.measured(entry.scores_digest)]
    for path in paths:
        content = store.backend.read(path)
        if content is not None:
            yield SharedFile(path=path, digest=digest_bytes(content), nbytes=len(content))


def _bank_files(store: Store, entry: Entry) -> Iterator[SharedFile]:
    """Their digests are in bank.json; a file that is another is refused where it is sent."""
    at = f"banks/{hex_of(entry.bank_digest)}"
    content = store.backend.read(f"{at}/{BANK_NAME}")
    if content is None:
        raise InputError(f"{store.url} has no bank of {entry.name}; push --scores-only, or add the work folder again")
    bank = Bank.parse(parse_json(content.decode(), f"{store.url}/{at}/{BANK_NAME}"), f"{store.url}/{at}/{BANK_NAME}")
    for module in bank.modules.values():
        path = f"{at}/{module.file}"
        yield SharedFile(path=path, digest=module.file_digest, nbytes=store.backend.size(path))
    yield SharedFile(path=f"{at}/{BANK_NAME}", digest=digest_bytes(content), nbytes=len(content))


def _source_files(store: Store, entry: Entry, progress: Progress) -> list[SharedFile]:
    at = f"sources/{hex_of(entry.model.digest)}"
    names = [name for name in store.backend.names(at) if name not in CARRIED_FOLDERS]
    names += [f"{folder}/{name}" for folder in CARRIED_FOLDERS for name in store.backend.names(f"{at}/{folder}")]
    if "config.json" not in names:
        raise InputError(f"{store.url} has lost its copy of {entry.name}; add it again with --copy-model")
    found = []
    with _local(store) as local:
        for name in progress.over(names, "reading the model", "file"):
            path = f"{at}/{name}"
            blank = SharedFile(path=path, digest="sha256:" + "0" * 64, nbytes=store.backend.size(path))
            with local(blank) as here:
                found.append(blank.model_copy(update={"digest": digest_file(here)}))
    return found


@contextmanager
def _local(store: Store) -> Iterator[LocalFile]:
    """Files of the store as files of this machine; those of object storage are fetched one at a time."""
    with tempfile.TemporaryDirectory(prefix="gamma-push-") as folder:

        @contextmanager
        def local(file: SharedFile) -> Iterator[Path]:
            if store.backend.folder is not None:
                yield store.backend.folder / file.path
                return
            target = Path(folder) / f"{hex_of(file.digest)}-{Path(file.path).name}"
            store.backend.download(file.path, target)
            try:
                yield target
            finally:
                target.unlink()

        yield local


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    """A folder for what is on its way, of one pull at a time; kept when the pull does not end, so that it goes on."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    of = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    folder = caches / "gamma" / "pulling" / of if store.backend.folder is None else store.backend.folder / ".pulling"
    holder = _hold(folder)
    try:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(holder)


def _hold(folder: Path) -> int:
    """Make the folder, and lock it once whoever has it is done with it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        holder = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(holder, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(holder), folder.stat()):
                return holder
        os.close(holder)  # it was removed meanwhile


def _telling(progress: Progress, step: str, total: int) -> Callable[[int], None]:
    tell, done = progress.bytes_of(step), 0

    def more(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        if total:
            tell(done, total)

    return more


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """What the libraries raise has no common base: here it becomes one error that says where."""
    try:
        yield
    except GammaError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreUnreachableError(
            f"{address} cannot be reached, or refuses ({reason[:300]}); the same command goes on from what is done"
        ) from error
