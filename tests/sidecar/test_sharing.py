"""Scores that somebody learned, pushed to and pulled from a real registry and a hub: what arrives is what was sent."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocator.contract.errors import ContractError, GammaError, InputError
from allocator.contract.manifest import Manifest, Verification
from allocator.contract.scores import Scores
from allocator.sidecar.materialise import materialise
from allocator.sidecar.remotes import open_remote
from allocator.sidecar.sharing import Pulled, Share, SharedFile, pull, push
from allocator.sidecar.store import Source, Store
from allocator.solve import SolveSettings, solve_scores

from .conftest import gamma
from .remotes import LOGIN, hub, proxy, registry


@pytest.fixture(scope="module")
def shelf(learned: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the tiny model with its 16-bit weights."""
    model, work = learned
    folder = tmp_path_factory.mktemp("shelf") / "store"
    gamma("store", "add", work, "--model", model, "--store", folder, "--name", "tiny", "--copy-model")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry for all tests, each with repositories of its own."""
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def filled(host: str, shelf: Path) -> str:
    """What the registry calls the content of the shelf."""
    return push(Store(str(shelf)), "tiny", open_remote(f"oci://{host}/org/tiny:v1"))[1]


def pulled(address: str, folder: Path, **options: object) -> Pulled:
    return pull(open_remote(address), Store(str(folder)), **options)  # type: ignore[arg-type]


def files_of(store: Path) -> dict[str, bytes]:
    kept = [path for path in store.rglob("*") if path.is_file() and not path.is_relative_to(store / "entries")]
    return {str(path.relative_to(store)): path.read_bytes() for path in kept}


def test_what_arrives_is_what_was_sent(filled: str, host: str, shelf: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    tag = f"oci://{host}/org/tiny:v1"
    got = pulled(tag, there)
    assert files_of(there) == files_of(shelf)
    assert got.fetched_bytes == sum(map(len, files_of(shelf).values()))
    (mine,), (theirs,) = (Store(str(folder)).entries() for folder in (shelf, there))
    assert theirs == mine

    assert pulled(tag, there).fetched_bytes == 0
    assert push(Store(str(there)), "tiny", open_remote(tag))[1] == filled  # the same content is the same thing
    assert pulled(filled, there, name="other").entry.name == "other"
    assert {entry.name for entry in Store(str(there)).entries()} == {"tiny", "other"}


def test_a_checkpoint_is_made_from_what_was_pulled(host: str, shelf: Path, tmp_path: Path) -> None:
    """By the commands."""
    there, address = tmp_path / "there", f"oci://{host}/org/made:v1"
    sent = json.loads(gamma("store", "push", "tiny", address, "--store", shelf, "--json").stdout)
    assert "offers tiny" in gamma("store", "pull", sent["address"], "--store", there).stdout
    prepare = ["prepare", "tiny", "--store", there, "--out", tmp_path / "out", "--budget", "3.75bits", "--json"]
    assert json.loads(gamma(*prepare).stdout)["manifest_digest"] == _solved(there).digest
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").exists()


def test_scores_alone_are_enough_to_solve(filled: str, shelf: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    got = pulled(filled, there, scores_only=True)
    assert got.fetched_bytes < sum(map(len, files_of(shelf).values())) / 4
    manifest = _solved(there)
    assert manifest.digest == _solved(shelf).digest
    with pytest.raises(InputError, match="pull it without --scores-only"):
        materialise(manifest, got.entry, Store(str(there)), tmp_path / "out")
    pulled(filled, there)
    assert files_of(there) == files_of(shelf)


def _solved(folder: Path) -> Manifest:
    store = Store(str(folder))
    scores = store.scores(store.entries()[0].scores_digest)
    assert scores is not None
    return solve_scores(scores, SolveSettings(average_bits=3.75))


def test_what_was_measured_comes_along(learned: tuple[Path, Path], filled: str, host: str, tmp_path: Path) -> None:
    solved = solve_scores(Scores.read(learned[1] / "scores.json"), SolveSettings(average_bits=4))
    found = Verification(
        text_digest="sha256:" + "1" * 64, tokens=9, kl=0.1, uniform_kl=0.2, uniform_bits=4, kept="assignment"
    )
    verified = solved.model_copy(update={"verification": found})
    pulled(filled, tmp_path / "mine", scores_only=True)
    mine = Store(str(tmp_path / "mine"))
    mine.add_manifest(verified)
    address = f"oci://{host}/org/measured:v1"
    push(mine, "tiny", open_remote(address), scores_only=True)
    digest = pulled(address, tmp_path / "theirs").entry.scores_digest
    assert Store(str(tmp_path / "theirs")).measured(digest) == [verified.digest]


def test_a_pull_that_was_cut_off_goes_on(filled: str, host: str, shelf: Path, tmp_path: Path) -> None:
    there, total = tmp_path / "there", sum(map(len, files_of(shelf).values()))
    with proxy(host) as between:
        address = filled.replace(host, between.host)
        between.allowed_bytes = total // 2
        with pytest.raises(GammaError, match="goes on from what is done"):
            pulled(address, there)
        assert Store(str(there)).entries() == []
        between.allowed_bytes = None
        pulled(address, there)
        assert between.ranges
        # The list of files came twice, everything else once.
        assert between.answered_bytes <= total + 2 * len(open_remote(filled).read())
    assert files_of(there) == files_of(shelf)


def test_damage_is_refused(shelf: Path, tmp_path: Path) -> None:
    there, blobs = tmp_path / "there", tmp_path / "registry"
    with registry(blobs) as here:
        address = f"oci://{here}/org/tiny:v1"
        share, _ = push(Store(str(shelf)), "tiny", open_remote(address))
        damaged = next(file for file in share.files if file.path.endswith(".safetensors"))
        (path,) = blobs.glob(f"**/blobs/sha256/*/{damaged.digest[7:]}/data")
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ContractError, match="it was not taken"):
            pulled(address, there)
        assert Store(str(there)).entries() == []
        path.write_bytes(good)
        pulled(address, there)
        assert files_of(there) == files_of(shelf)


def test_the_hub_has_and_gives_the_same(shelf: Path, tmp_path: Path) -> None:
    """By the commands, with the hub's own client: private, with a card, through a broken connection, by its tokens."""
    with hub() as there:
        environment = there.environment | {"HF_HOME": str(tmp_path / "hf")}
        sending = ["store", "push", "tiny", "hf://org/scores", "--store", shelf]
        assert "HF_TOKEN" in gamma(*sending, code=2, **environment | {"HF_TOKEN": "hf_wrong"}).stderr
        sent = json.loads(gamma(*sending, "--json", **environment).stdout)
        assert sent["address"] == f"hf://org/scores@{there.branches['main']}"
        assert there.visibility == "private"
        files = there.files[there.branches["main"]]
        assert "gamma store pull hf://org/scores" in there.blobs[files["README.md"]].decode()

        there.cut = 20_000  # bytes into the first large file the connection breaks, once
        gamma("store", "pull", sent["address"], "--store", tmp_path / "there", **environment)
        assert there.cut is None
        assert files_of(tmp_path / "there") == files_of(shelf)
        pull = ["store", "pull", "hf://org/scores@v9", "--store", tmp_path / "there"]
        assert "no such revision" in gamma(*pull, code=2, **environment).stderr

        gamma(*sending, "--scores-only", **environment)
        left = there.files[there.branches["main"]]
        assert not [path for path in left if path.startswith("banks/")]  # what the list no longer has is taken away
        uploads = there.uploads
        gamma(*sending, **environment)
        assert there.uploads == uploads  # the hub knows these files by content


def _log_in(monkeypatch: pytest.MonkeyPatch, folder: Path, content: dict) -> None:
    path = folder / "auth.json"
    path.write_text(json.dumps(content))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder / "none"))


@pytest.mark.parametrize("kind", ["file", "helper", "token"])
def test_logins_are_those_of_docker_and_podman(
    kind: str, host: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = base64.b64encode(":".join(LOGIN).encode()).decode()
    with proxy(host) as between, registry(tmp_path / "registry", login=True) as closed:
        between.asks = True
        here = between.host if kind == "token" else closed
        address, store = f"oci://{here}/org/tiny:v1", Store(str(shelf))
        _log_in(monkeypatch, tmp_path, {})
        with pytest.raises(InputError, match=f"docker login {here}"):
            push(store, "tiny", open_remote(address), scores_only=True)
        if kind == "helper":
            helper = tmp_path / "docker-credential-tests"
            told = json.dumps({"Username": LOGIN[0], "Secret": LOGIN[1]})
            helper.write_text(f"#!/bin/sh\nread host; test \"$host\" = {here} && echo '{told}'\n")
            helper.chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
            _log_in(monkeypatch, tmp_path, {"credHelpers": {here: "tests"}})
        else:
            _log_in(monkeypatch, tmp_path, {"auths": {here: {"auth": secret}}})
        push(store, "tiny", open_remote(address), scores_only=True)
        assert pulled(address, tmp_path / "there").entry.name == "tiny"


def test_others_must_find_the_model(tiny_store: Path, host: str, tmp_path: Path) -> None:
    address, store = f"oci://{host}/org/linked:v1", Store(str(tiny_store))
    with pytest.raises(InputError, match="which others do not have"):
        push(store, "tiny", open_remote(address))
    source = Source(kind="hub", location="org/tiny", revision="v1")
    push(store, "tiny", open_remote(address), source)
    assert pulled(address, tmp_path / "there").entry.source == source


def test_what_is_not_there_is_said(host: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such artifact"):
        pulled(f"oci://{host}/org/nothing:v1", tmp_path)
    with pytest.raises(GammaError, match="cannot be reached"):
        pulled("oci://127.0.0.1:9/x:v1", tmp_path)


@pytest.mark.parametrize("address", ["org/name", "s3://bucket/x", "hf://name", "oci://host/UPPER:v1", "oci://host/x"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="expected hf://owner/name@revision"):
        open_remote(address)


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "entries/{bank}.json", "banks/{bank}/../x", "banks/{other}/x", "jobs/x"]
)
def test_a_share_writes_to_no_other_place(path: str, shelf: Path) -> None:
    (entry,) = Store(str(shelf)).entries()
    bank, zeros = entry.bank_digest.removeprefix("sha256:"), "sha256:" + "0" * 64
    scores = SharedFile(path=f"scores/{entry.scores_digest[7:]}.json", digest=zeros, nbytes=1)
    strange = scores.model_copy(update={"path": path.format(bank=bank, other="0" * 64)})
    share = Share(entry=entry, files=[scores])
    document = share.payload()
    document["files"].append(strange.model_dump())
    with pytest.raises(ContractError, match="files are not those of the scores"):
        Share.parse(document | {"digest": share.digest}, "share")
