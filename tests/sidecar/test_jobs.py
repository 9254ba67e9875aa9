"""Checkpoint jobs when things go wrong: killed services, full disks, two services over one store."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.errors import ContractError, GammaError
from allocator.contract.scores import Scores
from allocator.run.progress import Standing, Tracker
from allocator.sidecar.job_files import JobFiles, JobRequest, Owner
from allocator.sidecar.jobs import Jobs
from allocator.sidecar.logs import Log
from allocator.sidecar.materialise import materialise
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.publish import publish
from allocator.sidecar.schemas import Job
from allocator.sidecar.store import Source, Store
from allocator.solve import SolveSettings, solve_scores
from tests.skips import lacking
from tests.waiting import wait_for

from .serving import Running, running


@pytest.fixture
def own_store(tiny_store: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    shutil.copytree(tiny_store, folder)
    return folder


def _asked(service: Running, bits: float) -> str:
    allocation = service.post("/v1/allocations", {"model": "tiny", "average_bits": bits})
    return str(allocation["manifest_digest"])


@pytest.mark.slow
def test_a_job_survives_kill_9_and_its_files_verify(own_store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log1", "--store", own_store) as first:
        digest = _asked(first, 4.25)
        job = first.post("/v1/checkpoints", {"manifest": digest}, 202)["id"]
        wait_for(lambda: first.get(f"/v1/jobs/{job}")["state"] != "queued")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    assert not (own_store / "checkpoints" / digest[7:]).exists()  # killed while it was being made
    with running(tmp_path / "log2", "--store", own_store) as second:
        done = second.finished(job)  # taken up without being asked again
        assert (done["state"], done["attempt"]) == ("succeeded", 2)
        _, manifest = check_checkpoint(Path(done["checkpoint"]))
        assert manifest.digest == digest
    assert [p.name for p in (own_store / "checkpoints").iterdir() if p.name != ".gamma-volume"] == [digest[7:]]


def test_a_failed_job_can_be_deleted(own_store: Path, tmp_path: Path) -> None:
    (own_store / "banks").rename(tmp_path / "banks")
    with running(tmp_path / "log", "--store", own_store) as service:
        job = service.post("/v1/checkpoints", {"manifest": _asked(service, 4.25)}, 202)["id"]
        assert service.finished(job)["state"] == "failed"
        assert [one["id"] for one in service.get("/v1/jobs")["data"]] == [job]
        assert service.http.post(f"/v1/jobs/{job}/cancel").status_code == 409
        assert service.http.delete(f"/v1/jobs/{job}").json() == {"object": "deleted", "id": job, "deleted": True}
        assert 'gamma_jobs{state="failed"} 0.0' in service.http.get("/metrics").text
        service.get(f"/v1/jobs/{job}", 404)
        assert service.get("/v1/jobs")["data"] == []
        assert service.http.delete(f"/v1/jobs/{job}").status_code == 404
    assert not list((own_store / "jobs").iterdir())


@pytest.mark.slow
def test_a_failed_job_is_tried_again_when_it_is_asked_for_again(own_store: Path, tmp_path: Path) -> None:
    (own_store / "banks").rename(tmp_path / "banks")
    with running(tmp_path / "log", "--store", own_store) as service:
        manifest = _asked(service, 4.25)
        job = service.post("/v1/checkpoints", {"manifest": manifest}, 202)["id"]
        assert service.finished(job)["state"] == "failed"
        (tmp_path / "banks").rename(own_store / "banks")
        assert service.post("/v1/checkpoints", {"manifest": manifest}, 202)["id"] == job
        assert service.finished(job)["state"] == "succeeded"


@pytest.mark.slow
def test_a_job_is_cancelled_by_whichever_service_is_asked(own_store: Path, tmp_path: Path) -> None:
    """One that is being made, and one that waits; both can be asked for again."""
    flags = ["--store", own_store]
    with running(tmp_path / "log1", *flags) as maker, running(tmp_path / "log2", *flags) as other:
        jobs = [maker.post("/v1/checkpoints", {"manifest": _asked(maker, b)}, 202)["id"] for b in (4.25, 5.25)]
        wait_for(lambda: maker.get(f"/v1/jobs/{jobs[0]}")["state"] != "queued")
        assert other.http.delete(f"/v1/jobs/{jobs[0]}").status_code == 409
        for job in reversed(jobs):
            assert other.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
        wait_for(lambda: {maker.get(f"/v1/jobs/{job}")["state"] for job in jobs} == {"cancelled"})
        assert [p.name for p in (own_store / "checkpoints").iterdir()] == [".gamma-volume"]
        again = maker.post("/v1/checkpoints", {"manifest": _asked(maker, 5.25)}, 202)
        assert again["id"] == jobs[1]
        assert maker.finished(jobs[1])["state"] == "succeeded"


@pytest.mark.slow
def test_a_killed_export_goes_on_with_what_was_copied(
    learned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = learned
    store = Store(f"memory://{tmp_path.name}")
    entry = publish(work, model, store, Source(kind="store")).entry
    manifest = solve_scores(Scores.read(work / "scores.json"), SolveSettings(average_bits=4.0))
    copied: list[str] = []
    download = store.backend.download
    monkeypatch.setattr(store.backend, "download", lambda path, to: (copied.append(path), download(path, to)))

    told: list[Standing] = []

    def run(started=lambda _process: None) -> None:
        materialise(manifest, entry, store, tmp_path / "out", Tracker(told.append), started)

    with pytest.raises(GammaError, match="no answer"):
        run(lambda process: process.kill())
    assert len(copied) > 5
    copied.clear()
    run()
    assert [path for path in copied if not path.endswith("bank.json")] == []
    assert check_checkpoint(tmp_path / "out")[1].digest == manifest.digest
    assert {"copying the bank", "copying the model", "writing"} <= {standing.step for standing in told}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(GammaError, match="no answer"):
        run(lambda process: process.kill())
    damaged = next((tmp_path / ".out.sources" / "bank").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ContractError, match="sha256"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == []  # and nothing damaged is kept


def test_a_job_says_where_it_stands_to_whoever_reads_its_files(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    files = JobFiles(store, Owner.me())
    request = JobRequest(
        manifest="sha256:" + "1" * 64, scores="sha256:" + "2" * 64, volume="v", tensor_bytes=1,
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    files.create(request)
    assert files.claim(request.identity, 1)
    record = files.read(request.identity)
    assert record is not None
    standing = Standing(step="writing", number=2, steps=3, unit="file", done=1, total=4, step_left_seconds=30.0)
    files.write(record.job.model_copy(update={"standing": standing, "step": "writing"}))
    record = JobFiles(store, Owner.me()).read(request.identity)
    assert record is not None
    assert record.job.standing == standing


@pytest.mark.slow
def test_a_stopped_service_leaves_its_job_to_the_next(own_store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log1", "--store", own_store) as first:
        job = first.post("/v1/checkpoints", {"manifest": _asked(first, 4.5)}, 202)["id"]
        wait_for(lambda: first.get(f"/v1/jobs/{job}")["state"] != "queued")
    assert "Traceback" not in (tmp_path / "log1").read_text()
    with running(tmp_path / "log2", "--store", own_store) as second:
        assert second.finished(job)["state"] == "succeeded"


@pytest.mark.slow
def test_two_services_over_one_store_give_one_result(own_store: Path, tmp_path: Path) -> None:
    with (
        running(tmp_path / "log1", "--store", own_store) as one,
        running(tmp_path / "log2", "--store", own_store) as two,
    ):
        services = [one, two] * 4
        body = {"model": "tiny", "average_bits": 3.75}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda s: s.http.post("/v1/allocations", json=body), services))
        assert {a.status_code for a in answers} == {200}
        assert len({a.content for a in answers}) == 1
        manifest = {"manifest": answers[0].json()["manifest_digest"]}
        with ThreadPoolExecutor(8) as pool:
            jobs = list(pool.map(lambda s: s.post("/v1/checkpoints", manifest, 202)["id"], services))
        assert len(set(jobs)) == 1
        states = [s.finished(jobs[0]) for s in (one, two)]
        assert [s["state"] for s in states] == ["succeeded", "succeeded"]
        check_checkpoint(Path(states[0]["checkpoint"]))
    claims = list((own_store / "jobs" / jobs[0][7:]).glob("claim-*"))
    assert len(claims) == 1  # it was made once


@pytest.mark.slow
def test_a_full_disk_fails_the_job_with_the_reason(own_store: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=False).returncode:
        pytest.skip(lacking("system", "a small file system may not be mounted"))
    try:
        with running(tmp_path / "log", "--store", own_store, "--checkpoints", small) as service:
            job = service.post("/v1/checkpoints", {"manifest": _asked(service, 6)}, 202)["id"]
            done = service.finished(job)
            assert done["state"] == "failed"
            assert "bytes free" in done["error"]
            assert done["checkpoint"] is None
            assert [p.name for p in small.iterdir()] == [".gamma-volume"]
            assert service.get("/v1/models")["data"]
            assert service.post("/v1/checkpoints", {"manifest": _asked(service, 6)}, 202)["state"] == "queued"
            assert service.finished(job)["attempt"] == 2
            assert "\ngamma_job_failures_total 2.0\n" in service.http.get("/metrics").text
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_writing_leaves_nothing(own_store: Path, tmp_path: Path) -> None:
    """No room is missing in advance, but the process may not write files as large as the checkpoint."""
    out = tmp_path / "checkpoints"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import runpy; runpy.run_module('allocator.pipeline.export_worker', run_name='__main__')"
    )
    with running(tmp_path / "log", "--store", own_store) as service:
        digest = _asked(service, 6)
    (bank,) = (own_store / "banks").iterdir()
    (entry,) = Store(str(own_store)).entries()
    task = {
        "model": entry.source.location, "manifest": str(own_store / "manifests" / f"{digest[7:]}.json"),
        "bank": str(bank), "out": str(out / "x"),
    }  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()
        lines = [json.loads(line) for line in process.stdout]
    assert "error" in lines[-1]
    assert not (out / "x").exists()


def test_more_jobs_than_allowed_are_refused_for_now(own_store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--store", own_store, "--job-queue", 1) as service:
        first, second = (_asked(service, bits) for bits in (4, 5))
        service.post("/v1/checkpoints", {"manifest": first}, 202)
        refused = service.http.post("/v1/checkpoints", json={"manifest": second})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "too_many_requests"


def test_a_claim_is_taken_over_only_from_the_dead(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    digest = "sha256:" + "1" * 64
    request = JobRequest(manifest=digest, scores=digest, volume="v", tensor_bytes=1, created="2026-01-01T00:00:00Z")
    me = Owner.me()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        started = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19]
        other = Owner(me.host, me.boot, me.namespace, sleeper.pid, started)
        theirs, ours = JobFiles(store, other), JobFiles(store, me)
        ours.create(request)
        assert ours.read(request.identity).open
        assert theirs.claim(request.identity, 1)
        assert not ours.claim(request.identity, 1)
        assert not ours.read(request.identity).open
        sleeper.kill()
    record = ours.read(request.identity)
    assert record.open
    assert record.attempt == 1
    assert ours.claim(request.identity, 2)
    elsewhere = JobFiles(store, Owner("elsewhere", "b", "n", 1, "1"))
    assert not elsewhere.read(request.identity).open  # cannot be seen from there, and was claimed just now
    assert os.getpid() == me.pid


def test_a_job_that_another_service_takes_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for a job and asking for it, another service may have begun: no second attempt is made."""
    store, digest = Store(str(tmp_path / "store")), "sha256:" + "1" * 64
    monkeypatch.setattr(store, "manifest", lambda _: SimpleNamespace(scores_digest=digest, tensor_bytes=1))
    jobs = Jobs(store, tmp_path / "checkpoints", 4, Metrics(), Log())
    me = Owner.me()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        started = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19]
        theirs = JobFiles(store, Owner(me.host, me.boot, me.namespace, sleeper.pid, started))
        create = JobFiles.create

        def create_and_lose(files: JobFiles, request: JobRequest) -> None:
            create(files, request)
            assert theirs.claim(request.identity, 1)

        monkeypatch.setattr(JobFiles, "create", create_and_lose)
        job = asyncio.run(jobs.submit(digest))
        assert (job.state, job.attempt) == ("running", 1)
        assert asyncio.run(jobs.get(job.id)).state == "running"
        assert asyncio.run(jobs.counts()) == {"running": 1}  # theirs; none is queued here
        sleeper.kill()


def test_the_result_of_a_job_is_the_last_that_the_store_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the store is still writing that the job runs while it fails."""
    store, digest = Store(str(tmp_path / "store")), "sha256:" + "1" * 64
    monkeypatch.setattr(store, "manifest", lambda _: SimpleNamespace(scores_digest=digest, tensor_bytes=1))
    write = JobFiles.write

    failed, failure_written, told = threading.Event(), threading.Event(), []

    class Watched(Log):
        def __call__(self, level: str, event: str, **fields: object) -> None:
            if event == "job failed":
                failed.set()

    def write_slowly(files: JobFiles, job: Job) -> None:
        if job.state == "running":
            assert failed.wait(60)
            failure_written.wait(0.5)  # it must not be, but has the time
        write(files, job)
        told.append(job.state)
        if job.state == "failed":
            failure_written.set()

    monkeypatch.setattr(JobFiles, "write", write_slowly)

    async def made() -> str:
        jobs = Jobs(store, tmp_path / "checkpoints", 4, Metrics(), Watched())
        job = await jobs.submit(digest)  # of no bank in the store: it fails at once
        jobs.start()
        await asyncio.to_thread(wait_for, lambda: {"running", "failed"} <= set(told), lambda: told)
        state = (await jobs.get(job.id)).state
        await jobs.close()
        return state

    assert asyncio.run(made()) == "failed"


def test_objects_in_the_store_outlive_the_service(own_store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log1", "--store", own_store) as first:
        made = first.post("/v1/allocations", {"model": "tiny", "budget": "190kB"})
    with running(tmp_path / "log2", "--store", own_store, "--read-only") as second:
        assert second.get(f"/v1/allocations/{made['id']}") == made
        assert second.get(f"/v1/allocations/{made['id']}/manifest")["digest"] == made["manifest_digest"]
        assert (
            second.post("/v1/checkpoints", {"manifest": made["manifest_digest"]}, 403)["error"]["type"] == "forbidden"
        )
        before = sorted(own_store.rglob("*"))
        second.post("/v1/allocations", {"model": "tiny", "budget": "191kB"})
        assert sorted(own_store.rglob("*")) == before
