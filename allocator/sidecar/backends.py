"""Where a store keeps its objects: a folder, or object storage through fsspec. Both can create an object atomically."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from allocator.contract.errors import GammaError, InputError

__all__ = ["Backend", "FolderBackend", "ObjectBackend", "StoreUnreachableError", "open_backend"]

_OBJECT_SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
_CHUNK_BYTES = 1 << 22
# A storage that does not answer is told within seconds, not after botocore's five times 60.
_S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}}}


class StoreUnreachableError(GammaError, OSError):
    """The storage does not answer, or refuses: nothing is known of what it holds."""


class Backend(Protocol):
    """Objects by path (`banks/<hex>/bank.json`). An object is there as a whole or not at all."""

    url: str
    folder: Path | None

    def check(self) -> None:
        """Raises InputError when there is no such folder or bucket, StoreUnreachableError when it does not answer."""

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

    def size(self, path: str) -> int:
        """Bytes of an object, 0 if there is none."""

    def delete(self, path: str) -> None:
        """Remove an object, if it is there."""


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

    def check(self) -> None:
        if not self._root.is_dir():
            raise InputError(
                f"store {self._root}: there is no such folder; is the name right, and the volume mounted? "
                "`gamma store add` makes a new store"
            )
        try:
            os.scandir(self._root).close()
        except OSError as error:
            raise StoreUnreachableError(f"store {self._root} cannot be read ({error})") from None

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreUnreachableError(f"{self._root / path} cannot be read ({error})") from None

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
        except OSError as error:
            raise StoreUnreachableError(f"{self._root / path} cannot be listed ({error})") from None

    def size(self, path: str) -> int:
        try:
            return (self._root / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def delete(self, path: str) -> None:
        target = self._root / path
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or gone
            if target.parent != self._root:
                target.parent.rmdir()

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
        options = _S3_OPTIONS if scheme == "s3" else {}
        try:
            self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False, **options)
        except ImportError:
            package = _OBJECT_SCHEMES[scheme]
            raise InputError(f"store {url}: needs the package {package}; pip install {package}") from None
        self._root = self._files._strip_protocol(self.url)
        self._scheme = scheme

    def check(self) -> None:
        with self._reaching():
            try:
                self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                bucket = self._root.partition("/")[0]
                if self._scheme == "memory" or self._files.exists(bucket):
                    return  # the bucket is there, nothing is in it under this name yet
                raise InputError(f"store {self.url}: there is no bucket {bucket!r}; is the name right?") from None

    def read(self, path: str) -> bytes | None:
        with self._reaching():
            try:
                return bytes(self._files.cat_file(self._at(path)))
            except FileNotFoundError:
                return None

    def exists(self, path: str) -> bool:
        with self._reaching():
            try:
                return bool(self._files.info(self._at(path))["type"] == "file")
            except FileNotFoundError:
                return False

    def create(self, path: str, content: bytes) -> bool:
        with self._reaching():
            try:
                self._files.pipe_file(self._at(path), content, mode="create")
            except FileExistsError:
                return False
            return True

    def replace(self, path: str, content: bytes) -> None:
        with self._reaching():
            self._files.pipe_file(self._at(path), content)

    def upload(self, source: Path, path: str) -> None:
        with self._reaching():
            self._files.put_file(str(source), self._at(path))

    def download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with self._reaching():
                self._files.get_file(self._at(path), str(temporary))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def names(self, path: str) -> list[str]:
        with self._reaching():
            try:
                found = self._files.ls(self._at(path), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def size(self, path: str) -> int:
        with self._reaching():
            try:
                return int(self._files.size(self._at(path)) or 0)
            except FileNotFoundError:
                return 0

    def delete(self, path: str) -> None:
        with self._reaching(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(path))

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """What the libraries of object storages raise has no common base: here it becomes one error that says where."""
        try:
            yield
        except (GammaError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreUnreachableError(f"store {self.url} cannot be reached, or refuses ({reason[:300]})") from error

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
