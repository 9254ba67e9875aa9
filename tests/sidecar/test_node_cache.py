"""A node's cache of checkpoints and compiled graphs: bounded, the longest unused goes first, never one in use."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from allocator.run.progress import silent
from allocator.sidecar.node_cache import IN_USE_NAME, cache_entries, hold, make_room, take_slot, using
from allocator.sidecar.prepare import prepare
from allocator.sidecar.settings import PrepareSettings
from allocator.sidecar.store import Store
from tests.waiting import wait_for

from .conftest import gamma
from .serving import running

MIB = 1 << 20


def entry(root: Path, name: str, mib: int, hours_ago: float) -> Path:
    folder = root / name
    with using(folder):
        (folder / "weights").write_bytes(os.urandom(mib * MIB))
    age(folder, hours_ago)
    return folder


def age(folder: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(folder / IN_USE_NAME, (then, then))


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_the_longest_unused_goes_first_and_only_as_much_as_is_needed(tmp_path: Path) -> None:
    for name, hours in (("new", 2), ("oldest", 50), ("old", 20)):
        entry(tmp_path, name, 2, hours)
    foreign = tmp_path / "somebody-elses"
    foreign.mkdir()
    (foreign / "data").write_bytes(bytes(MIB))
    assert make_room(tmp_path, 7 * MIB) == []
    assert [e.path.name for e in make_room(tmp_path, 7 * MIB, 2 * MIB)] == ["oldest"]
    assert [e.path.name for e in make_room(tmp_path, 3 * MIB)] == ["old"]
    assert names(tmp_path) == {"new", "somebody-elses"}


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    """A lock of another process, however long ago it was taken; and what a pod that is about to start has prepared."""
    served, starting = entry(tmp_path, "served", 2, 100), entry(tmp_path, "starting", 2, 0.5)
    ready = f"import sys; open(r'{tmp_path}/ready', 'w'); sys.stdin.read()"
    command = [sys.executable, "-m", "allocator.cli.main", "cache", "run", "--entry", str(served), "--"]
    with subprocess.Popen([*command, sys.executable, "-c", ready], stdin=subprocess.PIPE) as process:
        wait_for((tmp_path / "ready").exists)
        age(served, 100)
        with pytest.raises(InputError, match="are in use or were used within the last hour, the limit is"):
            make_room(tmp_path, MIB)
        assert {e.path.name for e in cache_entries(tmp_path) if e.in_use} == {"served", "starting"}
        process.communicate()
    for folder in (served, starting):
        assert folder.exists()
        age(folder, 2)
    assert {e.path.name for e in make_room(tmp_path, MIB)} == {"served", "starting"}


def test_an_entry_that_was_killed_while_it_was_removed_is_no_entry(tmp_path: Path) -> None:
    entry(tmp_path, "kept", 1, 9)
    entry(tmp_path, ".removing-half", 1, 99)
    assert [e.path.name for e in cache_entries(tmp_path)] == ["kept"]
    make_room(tmp_path, 8 * MIB)
    assert names(tmp_path) == {"kept"}


def test_replicas_on_a_node_compile_apart_and_find_their_own_again(tmp_path: Path) -> None:
    first, lock = take_slot(tmp_path, "compiled-qwen")
    second, other = take_slot(tmp_path, "compiled-qwen")
    assert (first.name, second.name) == ("compiled-qwen.0", "compiled-qwen.1")
    os.close(lock)
    again, lock = take_slot(tmp_path, "compiled-qwen")
    assert again == first
    os.close(lock)
    os.close(other)


def test_vllm_is_run_with_the_slot_as_its_caches(tmp_path: Path) -> None:
    folder = entry(tmp_path, "qwen", 1, 0)
    told = "import os; print(*sorted(f'{k}={v}' for k, v in os.environ.items() if 'CACHE' in k), sep='\\n')"
    command = ["cache", "run", "--entry", folder, "--compiled", "graphs", "--", sys.executable, "-c", told]
    lines = gamma(*command).stdout.splitlines()
    assert {f"VLLM_CACHE_ROOT={tmp_path}/graphs.0/vllm", f"TRITON_CACHE_DIR={tmp_path}/graphs.0/triton"} <= set(lines)
    assert "there is no such folder" in gamma("cache", "run", "--entry", tmp_path / "x", "--", "true", code=2).stderr


def test_prepare_makes_room_for_a_new_budget(tiny_store: Path, tmp_path: Path) -> None:
    """The former checkpoint stays while its pod may come back, and goes when it was not used for longer."""
    root, store = tmp_path / "node", Store(str(shutil.copytree(tiny_store, tmp_path / "store")))

    def prepared(budget: str, limit: int) -> Path:
        out = root / f"tiny-{budget}"
        prepare(PrepareSettings(model="tiny", budget=budget), store, out, silent, limit)
        return out

    first = prepared("4bits", 100 * MIB)
    (size,) = [e.nbytes for e in cache_entries(root)]
    with pytest.raises(InputError, match="give the cache more"):
        prepared("3bits", size + 1000)
    age(first, 3)
    (root / "tiny-3bits" / IN_USE_NAME).unlink()
    second = prepared("3bits", size + 1000)
    assert not first.exists()
    assert (second / "checkpoint" / "model.safetensors").exists()


def test_the_sidecar_keeps_what_its_pod_serves(tiny_store: Path, tmp_path: Path) -> None:
    """Also while vLLM is down and starts again."""
    served = entry(tmp_path, "served", 1, 9)
    with running(tmp_path / "log", "--store", tiny_store, "--prepared", served):
        age(served, 9)
        with pytest.raises(BlockingIOError):
            hold(served, shared=False, wait=False)
        with pytest.raises(InputError, match="in use"):
            make_room(tmp_path, 1000)
    age(served, 9)
    assert [e.path for e in make_room(tmp_path, 1000)] == [served]


def test_the_commands_tell_and_clean(tmp_path: Path) -> None:
    entry(tmp_path, "old", 1, 9)
    assert "old" in gamma("cache", "list", tmp_path).stdout
    assert "removed old" in gamma("cache", "clean", tmp_path, "--limit", "1KiB").stdout
    assert names(tmp_path) == set()
