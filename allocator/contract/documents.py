"""Strict JSON documents: versioned, self-digested, size-limited, written atomically.

Every file that parts exchange is a `Document`. Reading refuses, with the path and what to do: a file over the
size limit, broken JSON, duplicate keys, NaN, another schema or version, unknown keys, and content that does
not match the digest the file carries.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allocator.contract.digest import digest_json
from allocator.contract.errors import ContractError

__all__ = [
    "DIGEST_PATTERN",
    "Digest",
    "Document",
    "Strict",
    "explain",
    "parse_json",
    "read_text_limited",
    "write_atomically",
]

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]


class Strict(BaseModel):
    """Base of all parts of documents: unknown keys are refused, values are never coerced, objects are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Strict):
    """A file of the contract. Subclasses set `SCHEMA`, `VERSION` and their fields."""

    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int] = 1
    MAX_BYTES: ClassVar[int] = 64 << 20

    def payload(self) -> dict[str, Any]:
        """What is digested: schema, version and every field."""
        header = {"schema": self.SCHEMA, "schema_version": self.VERSION}
        return header | self.model_dump(mode="json", exclude_none=True)

    @property
    def digest(self) -> str:
        return digest_json(self.payload())

    def write(self, path: Path) -> None:
        """Write atomically: the file is either the old or the new one, never half of it."""
        text = json.dumps(self.payload() | {"digest": self.digest}, indent=1, allow_nan=False)
        write_atomically(path, text + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check. Raises ContractError with the reason and what to do."""
        document = parse_json(read_text_limited(path, cls.MAX_BYTES), path)
        return cls.parse(document, str(path))

    @classmethod
    def parse(cls, document: Any, where: str) -> Self:
        """Check a decoded JSON document. `where` names it in errors."""
        if not isinstance(document, dict):
            raise ContractError(f"{where}: expected a JSON object of schema {cls.SCHEMA}")
        document = dict(document)
        schema, version = document.pop("schema", None), document.pop("schema_version", None)
        recorded = document.pop("digest", None)
        if schema != cls.SCHEMA:
            raise ContractError(f"{where}: schema is {schema!r}, expected {cls.SCHEMA!r}; this is another kind of file")
        if type(version) is not int or version != cls.VERSION:
            raise ContractError(
                f"{where}: schema_version is {version!r}, this release reads {cls.VERSION}; "
                "make the file again or use the release that wrote it"
            )
        try:
            parsed = cls.model_validate_json(json.dumps(document, allow_nan=False), strict=True)
        except ValidationError as error:
            raise ContractError(f"{where}: {explain(error)}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ContractError(f"{where}: not valid JSON ({error})") from None
        if recorded != parsed.digest:
            raise ContractError(
                f"{where}: content digest is {parsed.digest}, the file says {recorded}; "
                "it was changed after it was written: make it again"
            )
        return parsed

    @classmethod
    def published_schema(cls) -> dict[str, Any]:
        """The JSON Schema of the file as written."""
        schema = cls.model_json_schema()
        envelope = {
            "schema": {"const": cls.SCHEMA},
            "schema_version": {"const": cls.VERSION},
            "digest": {"type": "string", "pattern": DIGEST_PATTERN},
        }
        schema["properties"] = envelope | schema["properties"]
        schema["required"] = [*envelope, *schema.get("required", [])]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.SCHEMA} | schema


def explain(error: ValidationError) -> str:
    """The first three complaints of pydantic as one sentence, with the place of each."""
    parts = []
    for item in error.errors(include_url=False)[:3]:
        place = ".".join(str(p) for p in item["loc"]) or "document"
        given = item.get("input")
        shown = f" (given {repr(given)[:80]})" if isinstance(given, str | int | float | bool) else ""
        parts.append(f"{place}: {item['msg']}{shown}")
    more = len(error.errors()) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def read_text_limited(path: Path, max_bytes: int) -> str:
    """Read UTF-8 text of at most `max_bytes`. Raises ContractError when absent, too large or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ContractError(f"{path}: {size} bytes, allowed are {max_bytes}; this is no file of ours")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ContractError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: cannot be read ({error})") from None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def parse_json(text: str, where: object) -> Any:
    """Decode JSON; duplicate keys, NaN and Infinity are refused. Raises ContractError naming `where`."""
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{where}: not valid JSON ({error}); the file may be cut short") from None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
