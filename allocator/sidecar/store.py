"""The store: scores, banks, manifests, allocations and jobs by content digest. The service keeps no other state.

    entries/<scores hex>.json      what is offered (`Entry`)
    entries/<scores hex>.<name>.json   the same scores under one more name
    scores/<hex>.json              `Scores`
    banks/<hex>/...                a bank folder, `bank.json` written last
    sources/<model hex>/...        the 16-bit model, if it was published too
    kv_cache/<model hex>.json      `KvCacheScores` of a model, if they were measured
    manifests/<hex>.json           `Manifest`, as `gamma solve --out` writes it
    measured/<scores hex>/<hex>    empty: this manifest of these scores says what was measured
    allocations/<hex>.json         request digest -> manifest digest
    jobs/<hex>/...                 see `jobs.py`
    check                          empty: `check_conditions` tries to write it twice

Hex is the SHA-256 of the content (of the request for allocations and jobs), so two services that write the same
object write the same bytes, and it does not matter which was first.
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from allocator.contract.bank import ModelReference
from allocator.contract.documents import DIGEST_PATTERN, Digest, Document, Strict, parse_json
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.outputs import check_output_folder
from allocator.contract.scores import KvCacheScores, Scores
from allocator.sidecar.backends import Backend, StoreUnreachableError, open_backend

__all__ = [
    "Entry",
    "Listing",
    "ModelName",
    "Source",
    "Store",
    "document_text",
    "hex_of",
]

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class Source(Strict):
    """Where the 16-bit model lies: in the store itself, in a folder, or on the Hugging Face hub (`org/name`)."""

    kind: Literal["store", "folder", "hub"]
    location: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _located(self) -> "Source":
        if (self.location is None) != (self.kind == "store"):
            raise ValueError(f"a source of kind {self.kind} has {'no' if self.kind == 'store' else 'a'} location")
        return self


class Entry(Document):
    """`entries/<scores digest>.json`. `config` is the model's config.json, which plans are made from.

    `feasible_bytes` are the smallest and the largest checkpoint, all tensors counted.
    """

    SCHEMA: ClassVar[str] = "gamma.store_entry"

    name: ModelName
    model: ModelReference
    config: dict[str, Any]
    source: Source
    scores_digest: Digest
    bank_digest: Digest
    method: str
    unit: str
    quantizer: str
    group_size: int
    symmetric: bool
    widths: list[int]
    modules: int = Field(ge=1)
    feasible_bytes: tuple[int, int]
    added: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")


_DIGEST = re.compile(DIGEST_PATTERN)
AnyDocument = TypeVar("AnyDocument", bound=Document)


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def hex_of(digest: str) -> str:
    """The part of a digest that names its object. Raises ValueError for anything that is no digest."""
    if not is_digest(digest):
        raise ValueError(f"{digest[:80]!r} is no digest")
    return digest.removeprefix("sha256:")


def document_text(document: Document) -> str:
    """The document as `Document.write` writes it."""
    return json.dumps(document.payload() | {"digest": document.digest}, indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Listing:
    """What a store offers, by the path of each entry; `unreadable` is why not, by path of those that cannot be read."""

    files: dict[str, Entry]
    unreadable: dict[str, str]

    @property
    def entries(self) -> list[Entry]:
        """The newest last; scores stand once under each of their names."""
        found = {(e.scores_digest, e.name): e for e in sorted(self.files.values(), key=lambda e: e.added)}
        return sorted(found.values(), key=lambda e: (e.added, e.scores_digest, e.name))


class Store:
    """Documents over a backend. What is read is checked: schema, digest, and that it is what was asked for."""

    def __init__(self, url: str) -> None:
        self.backend: Backend = open_backend(url)
        self.url = self.backend.url

    def check_conditions(self) -> None:
        """Raises InputError for a storage that does not keep conditions: a claim would have two winners."""
        self.backend.create("check", b"")
        if self.backend.create("check", b""):
            raise InputError(
                f"{self.url}: the storage ignores conditional writes (If-None-Match, ifGenerationMatch), so several "
                "services could claim one job; use a release of it that has them, or a folder"
            )

    def check_writable(self) -> None:
        """Raises InputError for a folder that cannot be written. Leaves nothing behind."""
        if self.backend.folder is not None:
            check_output_folder(self.backend.folder, "--store")

    def check(self) -> None:
        """Raises InputError when there is no such store, StoreUnreachableError when it does not answer."""
        self.backend.check()

    def listing(self) -> Listing:
        """Everything on offer. An entry that cannot be read hides none of the others."""
        files, unreadable = {}, {}
        for name in self.backend.names("entries"):
            path = f"entries/{name}"
            try:
                content = self.backend.read(path)
                if content is not None:
                    files[path] = _parse(Entry, content, f"{self.url}/{path}")
            except StoreUnreachableError as error:
                if self.backend.folder is None:
                    raise
                unreadable[path] = str(error)  # one file of a folder: its rights, or the disk
            except ContractError as error:
                unreadable[path] = str(error)
        return Listing(files, unreadable)

    def entries(self) -> list[Entry]:
        """Everything on offer that can be read, the newest last."""
        return self.listing().entries

    def scores(self, digest: str) -> Scores | None:
        return self._document(Scores, "scores", digest)

    def manifest(self, digest: str) -> Manifest | None:
        return self._document(Manifest, "manifests", digest)

    def manifest_text(self, digest: str) -> bytes | None:
        """The file of a manifest, byte for byte as `gamma solve --out` writes it."""
        return self.backend.read(f"manifests/{hex_of(digest)}.json")

    def kv_cache(self, model_digest: str) -> KvCacheScores | None:
        """What each dtype of the KV cache costs a model."""
        path = f"kv_cache/{hex_of(model_digest)}.json"
        content = self.backend.read(path)
        return None if content is None else _parse(KvCacheScores, content, f"{self.url}/{path}")

    def add_kv_cache(self, measured: KvCacheScores) -> None:
        """The latest measurement of a model counts."""
        path = f"kv_cache/{hex_of(measured.model.digest)}.json"
        self.backend.replace(path, document_text(measured).encode())

    def add_entry(self, entry: Entry) -> None:
        """Offer scores under a name. The same name again replaces the entry, another one is offered beside it."""
        first, content = f"entries/{hex_of(entry.scores_digest)}.json", document_text(entry).encode()
        if self.backend.create(first, content):
            return
        present = self.backend.read(first)
        try:
            same = present is None or _parse(Entry, present, first).name == entry.name
        except ContractError:
            same = True
        self.backend.replace(first if same else first.replace(".json", f".{entry.name}.json"), content)

    def add_scores(self, scores: Scores) -> None:
        self.backend.create(f"scores/{hex_of(scores.digest)}.json", document_text(scores).encode())

    def add_manifest(self, manifest: Manifest) -> bool:
        """False if it was there already."""
        new = self.backend.create(f"manifests/{hex_of(manifest.digest)}.json", document_text(manifest).encode())
        if manifest.scores_digest is not None and (manifest.verification or manifest.refinement):
            self.backend.create(f"measured/{hex_of(manifest.scores_digest)}/{hex_of(manifest.digest)}", b"")
        return new

    def measured(self, scores_digest: str) -> list[str]:
        """Digests of the manifests of some scores that say what was measured, sorted."""
        names = self.backend.names(f"measured/{hex_of(scores_digest)}")
        return [digest for name in names if is_digest(digest := f"sha256:{name}")]

    def _document(self, kind: type[AnyDocument], folder: str, digest: str) -> AnyDocument | None:
        path = f"{folder}/{hex_of(digest)}.json"
        content = self.backend.read(path)
        if content is None:
            return None
        document = _parse(kind, content, f"{self.url}/{path}")
        if document.digest != digest:
            raise ContractError(f"{self.url}/{path}: holds {document.digest}; remove it and add it again")
        return document


def _parse(kind: type[AnyDocument], content: bytes, where: str) -> AnyDocument:
    if len(content) > kind.MAX_BYTES:
        raise ContractError(f"{where}: {len(content)} bytes, allowed are {kind.MAX_BYTES}")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ContractError(f"{where}: not valid JSON ({error})") from None
    return kind.parse(parse_json(text, where), where)
