"""Makes checkpoints in a process of its own, which loads torch: the service never does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from allocator.contract.bank import BANK_NAME, Bank
from allocator.contract.documents import write_atomically
from allocator.contract.errors import ContractError, GammaError, InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.model import CARRIED_FOLDERS
from allocator.model.hf_config import HUB_SCHEME
from allocator.run.progress import Progress, silent
from allocator.run.progress_lines import standing_of
from allocator.sidecar.store import Entry, Store, document_text, hex_of

__all__ = ["materialise"]

_ERRORS: dict[int, type[GammaError]] = {
    kind.exit_code: kind for kind in (InputError, ContractError, InfeasibleBudgetError)
}


def materialise(
    manifest: Manifest,
    entry: Entry,
    store: Store,
    out: Path,
    progress: Progress = silent,
    started: Callable[[subprocess.Popen[str]], None] = lambda _process: None,
) -> None:
    """Write the checkpoint of `manifest` to `out`, atomically, from the bank and the model of `entry`.

    What lies in object storage is first copied to a hidden folder beside `out`, which needs room for it. `started` is
    given the process; killing it ends the work. After a kill, of that process or of this one, the next call goes on
    with the files that were copied and written. Raises the error that the export met, with its reason.
    """
    temporary = _sources_folder(out, f"{entry.model.digest} {manifest.bank_digest}")
    try:
        bank = _local_bank(store, manifest.bank_digest, temporary / "bank", progress)
        model = _local_model(store, entry, temporary / "model", progress)
        manifest_path = temporary / "manifest.json"
        write_atomically(manifest_path, document_text(manifest))
        task = {"model": model, "manifest": str(manifest_path), "bank": str(bank), "out": str(out)}
        for line in _run(task, started):
            if "step" in line:
                progress.relay(standing_of(line))
            elif "error" in line:
                raise _ERRORS.get(int(str(line["exit_code"])), GammaError)(str(line["error"]))
    except _KilledError:
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


class _KilledError(GammaError):
    """The process ended without a word."""


def _sources_folder(out: Path, of: str) -> Path:
    """The folder of copies for `out`. What an earlier call left in it is kept if it was `of` the same."""
    folder = out.with_name(f".{out.name}.sources")
    begun = folder / "of"
    if not begun.exists() or begun.read_text(encoding="utf-8") != of:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(begun, of)
    return folder


def _local_bank(store: Store, digest: str, target: Path, progress: Progress) -> Path:
    at = f"banks/{hex_of(digest)}"
    content = store.backend.read(f"{at}/{BANK_NAME}")
    if content is None:
        raise InputError(
            f"{store.url} has no bank {digest}; add it with `gamma store add`, or pull it without --scores-only"
        )
    if store.backend.folder is not None:
        return store.backend.folder / at
    store.backend.download(f"{at}/{BANK_NAME}", target / BANK_NAME)
    bank = Bank.read(target / BANK_NAME)
    for module in progress.over(bank.modules.values(), "copying the bank", "module"):
        _copy(store, f"{at}/{module.file}", target / module.file)
    return target


def _local_model(store: Store, entry: Entry, target: Path, progress: Progress) -> str:
    """A folder, or a hub id with its revision, which the export resolves."""
    if entry.source.kind == "hub" and entry.source.revision is not None:
        return f"{HUB_SCHEME}{entry.source.location}@{entry.source.revision}"
    if entry.source.kind != "store":
        return str(entry.source.location)
    at = f"sources/{hex_of(entry.model.digest)}"
    if store.backend.folder is not None:
        return str(store.backend.folder / at)
    names = [name for name in store.backend.names(at) if name not in CARRIED_FOLDERS]
    names += [f"{folder}/{name}" for folder in CARRIED_FOLDERS for name in store.backend.names(f"{at}/{folder}")]
    for name in progress.over(names, "copying the model", "file"):
        _copy(store, f"{at}/{name}", target / name)
    return str(target)


def _copy(store: Store, path: str, target: Path) -> None:
    if not target.exists():  # it appears as a whole; the export checks all digests
        store.backend.download(path, target)


@contextmanager
def _process(task: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "allocator.pipeline.export_worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()


def _run(task: dict[str, str], started: Callable[[subprocess.Popen[str]], None]) -> Iterator[dict[str, object]]:
    with _process(task) as process:
        started(process)
        assert process.stdout is not None
        ended = False
        for text in process.stdout:
            line = json.loads(text)
            ended = "files" in line or "error" in line
            yield line
            if ended:
                process.wait()
        if not ended:
            reason = f"the export ended with exit code {process.wait()} and no answer; is there enough memory?"
            raise _KilledError(reason)
