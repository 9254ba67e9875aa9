"""Measured losses: from `gamma solve --verify` through the store to the curve of the API and of the console."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from allocator.contract.manifest import Manifest
from allocator.sidecar.store import Store
from tests.waiting import wait_for

from .browser import browser, needs_chromium
from .conftest import gamma
from .serving import Running, running


@dataclass
class Measured:
    """A service over a store of its own, and a measured manifest that is added to that store by the first test."""

    service: Running
    store: Path
    file: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def measured(
    learned: tuple[Path, Path], tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measured]:
    (model, work), folder = learned, tmp_path_factory.mktemp("measured")
    text, file = folder / "text.txt", folder / "manifest.json"
    text.write_text("It was a dark night, and the old man was very glad of it. " * 40)
    measuring = ["--model", model, "--text", text, "--text-sequences", 4, "--text-sequence-length", 32]
    gamma("solve", work / "scores.json", "--average-bits", 4, "--verify", "--out", file, *measuring)
    shutil.copytree(tiny_store, folder / "store")
    with running(folder / "log", "--store", folder / "store") as service:
        yield Measured(service, folder / "store", file, Manifest.read(file))


def _sweep(measured: Measured) -> dict:
    return measured.service.post("/v1/sweeps", {"model": "tiny", "points": 5})


def test_a_stored_measured_manifest_changes_the_curve_and_its_id(measured: Measured) -> None:
    before = _sweep(measured)
    assert before["measured"] == []
    added = gamma("store", "add-manifest", measured.file, "--store", measured.store)
    assert f"manifest {measured.manifest.digest}: " in added.stdout
    wait_for(lambda: _sweep(measured)["id"] != before["id"])  # the store is listed once a second
    after = _sweep(measured)
    assert after["points"] == before["points"]
    (point,) = after["measured"]
    verified = measured.manifest.verification
    assert verified is not None
    assert point["manifest_digest"] == measured.manifest.digest
    assert point["measured_loss"] == min(verified.kl, verified.uniform_kl)
    assert (point["tokens"], point["text_digest"]) == (verified.tokens, verified.text_digest)
    assert point["tensor_bytes"] == measured.manifest.tensor_bytes
    assert measured.service.http.get(f"/v1/manifests/{measured.manifest.digest}").content == measured.file.read_bytes()
    assert _sweep(measured) == after
    assert measured.manifest.digest[7:15] in gamma("remote", "sweep", "tiny", "--url", measured.service.url).stdout


def test_adding_it_again_changes_nothing_and_unmeasured_ones_are_no_points(
    measured: Measured, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain.json"
    gamma("solve", learned[1] / "scores.json", "--average-bits", 3, "--out", plain)
    added = gamma("store", "add-manifest", measured.file, plain, "--store", measured.store, "--json").stdout
    assert json.loads(added)[1] == {"manifest": Manifest.read(plain).digest, "new": True}
    assert not json.loads(gamma("store", "add-manifest", plain, "--store", measured.store, "--json").stdout)[0]["new"]
    store = Store(str(measured.store))
    (entry,) = store.entries()
    assert store.measured(entry.scores_digest) == [measured.manifest.digest]
    assert store.manifest(Manifest.read(plain).digest) == Manifest.read(plain)  # can be pinned by its digest


def test_manifests_of_other_scores_are_refused(measured: Measured, learned: tuple[Path, Path], tmp_path: Path) -> None:
    model, work = learned
    (tmp_path / "empty").mkdir()
    refused = gamma("store", "add-manifest", measured.file, "--store", tmp_path / "empty", code=2)
    assert f"was solved from scores {measured.manifest.scores_digest}" in refused.stderr
    assert "it offers nothing" in refused.stderr
    foreign = measured.manifest.model_copy(update={"bank_digest": "sha256:" + "0" * 64})
    foreign.write(tmp_path / "foreign.json")
    refused = gamma("store", "add-manifest", tmp_path / "foreign.json", "--store", measured.store, code=3)
    assert "not of the model and bank of its scores" in refused.stderr
    gamma("store", "add", work, "--model", model, "--store", tmp_path / "new", "--manifest", measured.file)
    assert Store(str(tmp_path / "new")).measured(str(measured.manifest.scores_digest)) == [measured.manifest.digest]


def test_gamma_sweep_shows_what_was_measured_before(
    measured: Measured, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    scores = learned[1] / "scores.json"
    base = ["sweep", scores, "--from", "3bits", "--to", "6bits", "--points", 3]
    shown = gamma(*base, "--manifest", measured.file, "--figure", tmp_path / "curve.svg").stdout
    assert measured.manifest.digest[7:15] in shown
    (row,) = json.loads(gamma(*base, "--manifest", measured.file, "--json").stdout)["recorded"]
    assert row["manifest_digest"] == measured.manifest.digest
    assert (tmp_path / "curve.svg").stat().st_size > 1000
    gamma("solve", scores, "--average-bits", 3, "--out", tmp_path / "plain.json")
    assert "no measured loss" in gamma(*base, "--manifest", tmp_path / "plain.json", code=2).stderr


@pytest.mark.slow
@needs_chromium
def test_the_console_draws_and_lists_it(measured: Measured, tmp_path: Path) -> None:
    gamma("store", "add-manifest", measured.file, "--store", measured.store)
    with browser(tmp_path / "chromium") as page:
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
            page.size(width, 900, mobile=width < 400)
            page.scheme(scheme)
            page.open("about:blank")
            page.open(f"{measured.service.url}/#model=tiny&gpu=l4&length=128")
            page.until("document.querySelector('#curve .measured') && document.querySelector('#measured tbody tr')")
            assert page.js("document.documentElement.scrollWidth") <= width
            page.picture(tmp_path / f"console-{width}-{scheme}.png")
        verified = measured.manifest.verification
        assert verified is not None
        told = page.js("document.querySelector('#curve .measured title').textContent")
        assert f"{verified.tokens} tokens of {verified.text_digest[7:15]}" in told
        assert told.split(";")[0] in page.js("document.querySelector('#curve svg').getAttribute('aria-label')")
        assert page.js("document.querySelectorAll('#measured tbody td').length") == 5
        assert page.problems == []
