"""Where a store keeps its objects: a folder, or object storage through fsspec. Both can create an object atomically."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from allocator.contract.errors import InputError

__all__ = ["Backend", "FolderBackend", "ObjectBackend", "open_backend"]

_OBJECT_SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
_CHUNK_BYTES = 1 << 22


class Backend(Protocol):
    """Objects by path (`banks/<hex>/bank.json`). An object is there as a whole or not at all."""

    url: str
    folder: Path | None

    def read(self, path: str) -> bytes | None:
        """Content of `path`, None if there is no such object."""

    def exists(self, path: str) -> bool: ...

    def create(self, path: str, content: bytes) -> bool:
        """Write `path` if it is not there; False if it is, then nothing is changed. Safe against other writers."""

    def replace(self, path: str, content: bytes) -> None:
        """Write `path`, whatever it was."""

    def upload(self, source: Path, path: str) -> None:
        """Write the file `source` to `path`, which may be large."""

    def download(self, path: str, target: Path) -> None:
        """Write the object `path`, which may be large, to the file `target`, atomically."""

    def names(self, path: str) -> list[str]:
        """Names of the objects directly under `path`, sorted; empty if there is none."""


def open_backend(url: str) -> Backend:
    """The backend of a folder or of `file://`, `s3://`, `gs://` or `memory://`. Raises InputError for anything else."""
    if "::" in url:
        raise InputError(f"store {url!r}: chained addresses are not allowed")
    scheme, separator, _ = url.partition("://")
    if not separator:
        return FolderBackend(Path(url).absolute())
    if scheme == "file":
        return FolderBackend(Path(unquote(urlsplit(url).path)).absolute())
    if scheme not in _OBJECT_SCHEMES:
        allowed = "a folder, file://, s3:// or gs://"
        raise InputError(f"store {url!r}: {scheme}:// is not supported; give {allowed}")
    return ObjectBackend(url)


class FolderBackend:
    """A folder, also on a network file system: it needs rename and hard links, and nothing else."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"store {folder}: is no folder")
        self.folder: Path | None = folder
        self._root = folder
        self.url = str(folder)

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def exists(self, path: str) -> bool:
        return (self._root / path).is_file()

    def create(self, path: str, content: bytes) -> bool:
        target = self._root / path
        if target.exists():
            return False
        temporary = self._write_beside(target, content)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def replace(self, path: str, content: bytes) -> None:
        target = self._root / path
        temporary = self._write_beside(target, content)
        try:
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def upload(self, source: Path, path: str) -> None:
        _copy(source, self._root / path)

    def download(self, path: str, target: Path) -> None:
        _copy(self._root / path, target)

    def names(self, path: str) -> list[str]:
        try:
            with os.scandir(self._root / path) as entries:
                return sorted(e.name for e in entries if not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _write_beside(self, target: Path, content: bytes) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)


class ObjectBackend:
    """Object storage. `create` is the storage's own conditional write (If-None-Match, generation 0)."""

    def __init__(self, url: str) -> None:
        # gcsfs asks for the kind of each bucket by a second protocol, with rights of its own; ours are plain objects.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import fsspec

        self.url = url.rstrip("/")
        self.folder: Path | None = None
        scheme = url.partition("://")[0]
        try:
            self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError:
            package = _OBJECT_SCHEMES[scheme]
            raise InputError(f"store {url}: needs the package {package}; pip install {package}") from None
        self._root = self._files._strip_protocol(self.url)

    def read(self, path: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(self._at(path)))
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        return bool(self._files.isfile(self._at(path)))

    def create(self, path: str, content: bytes) -> bool:
        try:
            self._files.pipe_file(self._at(path), content, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, path: str, content: bytes) -> None:
        self._files.pipe_file(self._at(path), content)

    def upload(self, source: Path, path: str) -> None:
        self._files.put_file(str(source), self._at(path))

    def download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            self._files.get_file(self._at(path), str(temporary))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def names(self, path: str) -> list[str]:
        try:
            found = self._files.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
    try:
        with source.open("rb") as reader, os.fdopen(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
            writer.flush()
            os.fsync(writer.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
