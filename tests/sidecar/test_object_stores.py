"""Stores in object storage, against real HTTP servers: what folders promise, buckets keep too."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.manifest import Manifest
from allocator.sidecar.backends import ObjectBackend, open_backend
from tests.skips import lacking
from tests.waiting import wait_for

from .conftest import gamma
from .object_servers import Bucket, bucket, missing
from .serving import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["s3", "gs"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    if reason := missing(request.param):
        pytest.skip(lacking("package", reason))
    with bucket(request.param, tmp_path_factory.mktemp("bucket") / "log") as made:
        yield made


@pytest.fixture
def backend(served: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectBackend]:
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    opened = open_backend(served.url.replace("gamma", "objects"))
    assert isinstance(opened, ObjectBackend)
    yield opened
    files = fsspec.get_filesystem_class(urlsplit(served.url).scheme)
    files.clear_instance_cache()  # the next server has another address


def test_objects_are_created_once_and_replaced_whole(backend: ObjectBackend) -> None:
    assert backend.read("jobs/a.json") is None
    assert backend.names("jobs") == []
    assert not backend.exists("jobs/a.json")
    assert backend.create("jobs/a.json", b"1")
    assert not backend.create("jobs/a.json", b"2")
    assert backend.read("jobs/a.json") == b"1"
    backend.replace("jobs/a.json", b"3")
    assert backend.read("jobs/a.json") == b"3"
    assert backend.create("jobs/sub/b.json", b"")
    assert backend.names("jobs") == ["a.json", "sub"]
    assert backend.exists("jobs/a.json")


def test_of_many_writers_at_once_one_creates(backend: ObjectBackend) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: backend.create("allocations/x.json", str(i).encode() * 1000), range(32)))
    assert sum(won) == 1
    assert backend.read("allocations/x.json") == str(won.index(True)).encode() * 1000


def test_large_objects_come_back_as_they_were(backend: ObjectBackend, tmp_path: Path) -> None:
    content = os.urandom(12 << 20)
    (tmp_path / "a").write_bytes(content)
    backend.upload(tmp_path / "a", "banks/a")
    backend.download("banks/a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").read_bytes() == content
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["c"]
    assert backend.create("scores/large.json", content)  # scores of a large model
    assert not backend.create("scores/large.json", content)
    with pytest.raises(FileNotFoundError):
        backend.download("banks/none", tmp_path / "none")


def test_the_whole_way_from_a_work_folder_to_a_checkpoint(
    served: Bucket, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    """Fill, list, serve, allocate with two services at once, make a checkpoint through a kill -9, prepare."""
    (model, work), url, environment = learned, served.url, served.environment
    add = ["store", "add", work, "--model", model, "--store", url, "--name", "tiny", "--copy-model", "--json"]
    assert json.loads(gamma(*add, **environment).stdout)["written_bytes"] > 0
    assert json.loads(gamma(*add, **environment).stdout)["written_bytes"] == 0
    assert "tiny" in gamma("store", "list", "--store", url, **environment).stdout

    flags = ["--store", url, "--checkpoints", tmp_path / "checkpoints"]
    with (
        running(tmp_path / "log1", *flags, **environment) as one,
        running(tmp_path / "log2", *flags, **environment) as two,
    ):
        body = {"model": "tiny", "average_bits": 3.75}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda s: s.http.post("/v1/allocations", json=body), [one, two] * 4))
        assert {a.status_code for a in answers} == {200}
        assert len({a.content for a in answers}) == 1
        digest = answers[0].json()["manifest_digest"]
        gamma("solve", work / "scores.json", "--average-bits", 3.75, "--out", tmp_path / "manifest.json")
        assert two.http.get(f"/v1/manifests/{digest}").content == (tmp_path / "manifest.json").read_bytes()

        job = one.post("/v1/checkpoints", {"manifest": digest}, 202)["id"]
        wait_for(lambda: one.get(f"/v1/jobs/{job}")["state"] != "queued")
        one.process.send_signal(signal.SIGKILL)
        one.process.wait()
        two.post("/v1/checkpoints", {"manifest": digest}, 202)
        done = two.finished(job)
        assert (done["state"], done["attempt"]) == ("succeeded", 2)
        _, manifest = check_checkpoint(Path(done["checkpoint"]))
        assert manifest.digest == digest
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(left) == [".gamma-volume", digest[7:]]  # no sources, no half checkpoint

    prepare = ["prepare", "tiny", "--store", url, "--out", tmp_path / "served", "--budget", digest, "--json"]
    assert json.loads(gamma(*prepare, **environment).stdout)["manifest_digest"] == digest
    written = tmp_path / "served" / "checkpoint" / "model.safetensors"
    assert written.read_bytes() == (Path(done["checkpoint"]) / "model.safetensors").read_bytes()
    assert Manifest.read(tmp_path / "served" / "manifest.json").digest == digest
