"""The store: what is in it is whole, checked, and the same for everybody who writes it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from allocator.contract.errors import ContractError, InputError
from allocator.contract.scores import Scores
from allocator.sidecar.backends import open_backend
from allocator.sidecar.choice import find_entry
from allocator.sidecar.materialise import materialise
from allocator.sidecar.publish import publish
from allocator.sidecar.store import Source, Store
from allocator.solve import SolveSettings, solve_scores

from .conftest import gamma


@pytest.fixture(params=["folder", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kinds = {"folder": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}"}
    return kinds[request.param]


def test_objects_are_created_once_and_replaced_whole(url: str) -> None:
    backend = open_backend(url)
    assert backend.read("jobs/a.json") is None
    assert backend.names("jobs") == []
    assert backend.create("jobs/a.json", b"1")
    assert not backend.create("jobs/a.json", b"2")
    assert backend.read("jobs/a.json") == b"1"
    backend.replace("jobs/a.json", b"3")
    assert backend.read("jobs/a.json") == b"3"
    backend.create("jobs/sub/b.json", b"")
    assert backend.names("jobs") == ["a.json", "sub"]


def test_of_many_writers_at_once_one_creates(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: backend.create("allocations/x.json", str(i).encode() * 10000), range(64)))
    assert sum(won) == 1
    assert backend.read("allocations/x.json") == str(won.index(True)).encode() * 10000
    assert backend.names("allocations") == ["x.json"]


def test_a_storage_that_ignores_conditions_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    store.check_conditions()
    store.check_conditions()
    monkeypatch.setattr(store.backend, "create", lambda path, content: True)
    with pytest.raises(InputError, match="ignores conditional writes"):
        store.check_conditions()


@pytest.mark.parametrize("url", ["http://host/x", "github://a/b", "simplecache::s3://x", "ftp://x/y"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="not"):
        Store(url)


@pytest.mark.parametrize(
    "digest", ["", "sha256:12", "../../etc/passwd", "sha256:" + "A" * 64, "sha256:" + "a" * 64 + "/.."]
)
def test_only_digests_name_objects(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="no digest"):
        Store(str(tmp_path)).manifest_text(digest)


def test_an_object_under_another_name_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(tiny_store, copy)
    store = Store(str(copy))
    (entry,) = store.entries()
    moved = "sha256:" + "1" * 64
    (copy / "scores" / f"{entry.scores_digest[7:]}.json").rename(copy / "scores" / f"{moved[7:]}.json")
    assert store.scores(entry.scores_digest) is None
    with pytest.raises(ContractError, match="holds"):
        store.scores(moved)


def test_add_publishes_what_belongs_together_and_only_once(
    learned: tuple[Path, Path], tiny_store: Path, tmp_path: Path
) -> None:
    model, work = learned
    store = Store(str(tiny_store))
    (entry,) = store.entries()
    scores = Scores.read(work / "scores.json")
    assert (entry.name, entry.scores_digest, entry.model) == ("tiny", scores.digest, scores.model)
    assert store.scores(scores.digest) == scores
    again = json.loads(
        gamma("store", "add", work, "--model", model, "--store", tiny_store, "--name", "tiny", "--json").stdout
    )
    assert again["written_bytes"] == 0
    assert "tiny" in gamma("store", "list", "--store", tiny_store).stdout

    damaged = tmp_path / "damaged"
    shutil.copytree(work, damaged)
    file = next((damaged / "bank").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    refused = gamma("store", "add", damaged, "--model", model, "--store", tmp_path / "new", code=3)
    assert "bank.json says" in refused.stderr
    assert gamma("store", "list", "--store", tmp_path / "new", "--json").stdout.strip() == "[]"


@pytest.fixture
def two_names(learned: tuple[Path, Path], tmp_path: Path) -> Path:
    """A store that offers the same scores as "tiny" and as "other"."""
    model, work = learned
    folder = tmp_path / "two"
    gamma("store", "add", work, "--model", model, "--store", folder, "--name", "tiny")
    gamma("store", "add", work, "--model", model, "--store", folder, "--name", "other", "--copy-model")
    return folder


def test_a_second_name_is_one_more(two_names: Path) -> None:
    listed = json.loads(gamma("store", "list", "--store", two_names, "--json").stdout)
    assert {entry["name"] for entry in listed} == {"tiny", "other"}
    store = Store(str(two_names))
    for name in ("tiny", "other"):
        assert find_entry(store, name).name == name


def test_remove_takes_what_nothing_else_needs(two_names: Path) -> None:
    store = Store(str(two_names))
    before = _files(two_names)
    plan = json.loads(gamma("store", "remove", "tiny", "--store", two_names, "--dry-run", "--json").stdout)
    assert _files(two_names) == before
    assert all(path.startswith("entries/") for path in plan["removed"])
    assert len(plan["kept"]) == 3  # scores, bank, model: "other" needs them
    assert all("other" in reason for reason in plan["kept"].values())

    gamma("store", "remove", "tiny", "--store", two_names)
    assert before - _files(two_names) == set(plan["removed"])
    assert [entry.name for entry in store.entries()] == ["other"]
    scores = store.scores(store.entries()[0].scores_digest)
    assert scores is not None
    store.add_manifest(solve_scores(scores, SolveSettings(average_bits=4)))
    said = gamma("store", "remove", "other", "--store", two_names).stdout
    assert "removed: " in said
    assert _files(two_names) == {"check"}
    assert "has no entry 'other'" in gamma("store", "remove", "other", "--store", two_names, code=2).stderr


def test_remove_spares_what_an_unreadable_entry_may_need(two_names: Path) -> None:
    broken = two_names / "entries" / f"{'0' * 64}.json"
    broken.write_text("{")
    gamma("store", "remove", "tiny", "--store", two_names)
    gamma("store", "remove", "other", "--store", two_names)
    assert {path.partition("/")[0] for path in _files(two_names)} == {"check", "entries", "scores", "banks", "sources"}
    gamma("store", "remove", f"sha256:{'0' * 64}", "--store", two_names)
    assert not broken.exists()


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_another_model_is_refused(learned: tuple[Path, Path], tiny_model, tmp_path: Path) -> None:
    _, work = learned
    refused = gamma("store", "add", work, "--model", tiny_model("llama"), "--store", tmp_path / "s", code=3)
    assert "was learned from model" in refused.stderr


def test_a_copied_model_has_all_its_side_files(learned: tuple[Path, Path], tmp_path: Path) -> None:
    model, work = tmp_path / "model", learned[1]
    shutil.copytree(learned[0], model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    store = Store(f"file://{tmp_path}/store")
    entry = publish(work, model, store, Source(kind="store")).entry
    manifest = solve_scores(Scores.read(work / "scores.json"), SolveSettings(average_bits=5))
    materialise(manifest, entry, store, tmp_path / "out")
    names = ("additional_chat_templates/tool_use.jinja", "tokenizer.json", "generation_config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (model / name).read_bytes() for name in names)
