"""What operators rely on: a light start, metrics, --node, what is logged."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.contract.checkpoint import check_checkpoint
from tests.programs import program
from tests.skips import lacking
from tests.waiting import wait_for

from .conftest import gamma
from .object_servers import PATH, missing
from .serving import Running, running


def test_the_service_is_light_and_loads_no_torch(store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--store", store) as service:
        service.post("/v1/allocations", {"model": "tiny", "average_bits": 4.75})
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        total = 0
        for pid in [str(service.process.pid), *children]:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(rollup.split("Pss:")[1].split()[0])
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        assert total / 1024 < 150, f"{total / 1024:.0f} MiB in all processes"


def test_starting_imports_nothing_heavy() -> None:
    """Imports and the app, until it would listen. `make bench-cli` has the time."""
    code = (
        "import sys; from allocator.sidecar.app import create_app;"
        "from allocator.sidecar.settings import ServiceSettings; create_app(ServiceSettings(store=sys.argv[1]));"
        "print(*sys.modules)"
    )
    loaded = set(subprocess.check_output([sys.executable, "-c", code, os.curdir], text=True).split())
    assert "fastapi" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "ortools", "numpy", "opentelemetry"}


def test_metrics_are_clean_and_count(sidecar: Running) -> None:
    sidecar.get("/v1/models")
    sidecar.post("/v1/allocations", {"model": "tiny", "average_bits": 5.25})
    sidecar.post("/v1/plans", {"model": "tiny", "gpu": "l4"})
    sidecar.http.get("/no/such/path")
    text = sidecar.http.get("/metrics").text
    for line in (
        'gamma_sidecar_requests_total{code="200",method="GET",route="/v1/models"}',
        'gamma_sidecar_requests_total{code="404",method="GET",route="unmatched"}',
        'gamma_sidecar_request_duration_seconds_count{route="/v1/allocations"}',
        "gamma_solve_duration_seconds_count",
        "gamma_solve_gap_ratio_bucket",
        'gamma_jobs{state="queued"}',
        "gamma_solves_cut_total 0.0",
        "gamma_job_failures_total 0.0",
    ):
        assert line in text, text
    assert "gamma_plan_headroom_bytes{" not in text  # of a plan that somebody asked for: nothing serves it
    command = [program("promtool"), "check", "metrics"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_node_prepares_itself_and_is_ready_then(tiny_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    flags = ["--store", tiny_store, "--node", "tiny", "--out", out, "--budget", "4bits", "--read-only"]
    with running(tmp_path / "log", *flags) as service:
        assert service.http.get("/readyz").status_code in (200, 503)
        wait_for(lambda: service.http.get("/readyz").status_code == 200, (tmp_path / "log").read_text, 120)
        node = service.get("/v1/node")
        assert node["state"] == "ready"
        assert node["vllm_arguments"]["served-model-name"] == "tiny"
        assert f'manifest="{node["manifest_digest"]}"' in service.http.get("/metrics").text
    _, manifest = check_checkpoint(out / "checkpoint")
    assert manifest.digest == node["manifest_digest"]
    assert (out / "vllm.yaml").exists()


def test_a_prepared_folder_is_told_of(tiny_store: Path, tmp_path: Path) -> None:
    """The sidecar beside a server whose init container prepared the folder."""
    out = tmp_path / "served"
    gamma("prepare", "tiny", "--store", tiny_store, "--out", out, "--gpu", "l4", "--max-model-len", 128)
    plan = json.loads((out / "plan.json").read_text())
    headroom = plan["weight_budget_bytes"] - plan["smallest_weight_bytes"]
    with running(tmp_path / "log", "--store", tiny_store, "--prepared", out, "--read-only") as service:
        node = service.get("/v1/node")
        assert (node["state"], node["checkpoint"]) == ("ready", str(out / "checkpoint"))
        service.post("/v1/plans", {"model": "tiny", "gpu": "h100"})
        (line,) = re.findall(r"^gamma_plan_headroom_bytes.*$", service.http.get("/metrics").text, re.MULTILINE)
        assert line.startswith('gamma_plan_headroom_bytes{gpu="NVIDIA L4",model="tiny"} ')
        assert float(line.rpartition(" ")[2]) == headroom
        assert f'manifest="{node["manifest_digest"]}"' in service.http.get("/metrics").text


def test_a_folder_that_tells_nothing_does_not_take_the_pod_down(tiny_store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--store", tiny_store, "--prepared", tmp_path / "none") as service:
        assert service.http.get("/readyz").status_code == 200
        assert service.get("/v1/node")["state"] == "off"
    assert "tells nothing of what is served" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_node_that_cannot_prepare_says_why_and_lives(tiny_store: Path, tmp_path: Path) -> None:
    flags = ["--store", tiny_store, "--node", "tiny", "--out", tmp_path / "out", "--gpu-memory", "300MiB"]
    with running(tmp_path / "log", *flags) as service:
        wait_for(lambda: service.get("/v1/node")["state"] != "preparing", (tmp_path / "log").read_text, 120)
        answer = service.http.get("/readyz")
        assert answer.status_code == 503
        assert "does not fit" in answer.json()["message"]
        assert service.get("/v1/models")["data"]


def test_options_come_from_the_environment(store: Path, tmp_path: Path) -> None:
    environment = {"GAMMA_STORE": str(store), "GAMMA_PORT": "tcp://10.0.0.1:80", "GAMMA_READ_ONLY": "true"}
    with running(tmp_path / "log", **environment) as service:
        assert service.get("/v1/models")["data"]
        assert service.post("/v1/checkpoints", {"manifest": "sha256:" + "0" * 64}, 403)


def test_what_cannot_be_started_says_why(store: Path, tmp_path: Path) -> None:
    assert "--store" in gamma("sidecar", code=2).stderr
    assert "not supported" in gamma("sidecar", "--store", "ftp://x", code=2).stderr
    assert "token file" in gamma("sidecar", "--store", store, "--token-file", tmp_path / "none", code=2).stderr
    assert "--out" in gamma("sidecar", "--store", store, "--node", "tiny", code=2).stderr


@pytest.mark.parametrize(
    "command",
    [
        ["sidecar"],
        ["prepare", "tiny", "--out", "OUT", "--budget", "4bits"],
        ["store", "list"],
        ["store", "remove", "tiny"],
    ],
)
def test_a_store_that_is_not_there_is_refused_and_not_made(tmp_path: Path, command: list[str]) -> None:
    missing = tmp_path / "stoer"
    command = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    refused = gamma(*command, "--store", missing, code=2)
    assert str(missing) in refused.stderr
    assert "no such folder" in refused.stderr
    assert not missing.exists()


def test_a_storage_that_does_not_answer_is_told_and_waited_for(tmp_path: Path) -> None:
    """No traceback, no 500: 503 with the address, not ready, a metric."""
    if lacks := missing("s3"):
        pytest.skip(lacking("package", lacks))
    nobody = {
        "PYTHONPATH": PATH,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    url = "s3://models/gamma"
    assert f"store {url} cannot be reached" in gamma("store", "list", "--store", url, code=1, **nobody).stderr
    with running(tmp_path / "log", "--store", url, **nobody) as service:
        error = service.get("/v1/models", 503)["error"]
        assert error["type"] == "unavailable"
        assert url in error["message"]
        assert url in service.get("/readyz", 503)["message"]
        assert "gamma_store_reachable 0.0" in service.http.get("/metrics").text
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_folder_that_goes_away_is_told(tiny_store: Path, tmp_path: Path) -> None:
    """Such as a volume that is no longer mounted: the list is not simply empty."""
    folder = tmp_path / "store"
    shutil.copytree(tiny_store, folder)
    with running(tmp_path / "log", "--store", folder, "--read-only") as service:
        assert service.get("/v1/models")["data"]
        folder.rename(tmp_path / "elsewhere")
        wait_for(lambda: service.http.get("/v1/models").status_code != 200)
        answer = service.http.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")
        (tmp_path / "elsewhere").rename(folder)
        wait_for(lambda: service.http.get("/v1/models").status_code == 200)


def test_one_unreadable_entry_hides_no_model(tiny_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(tiny_store, folder)
    broken = folder / "entries" / f"{'0' * 64}.json"
    broken.write_text('{"schema": "gamma.store_entry", "schema_ver')
    with running(tmp_path / "log", "--store", folder) as service:
        assert [m["name"] for m in service.get("/v1/models")["data"]] == ["tiny"]
        assert service.post("/v1/allocations", {"model": "tiny", "average_bits": 4})["tensor_bytes"]
        assert "gamma_store_unreadable_entries 1.0" in service.http.get("/metrics").text
        assert broken.name in service.get("/readyz")["message"]
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert [line["entry"] for line in lines if "left out" in line["event"]] == [f"entries/{broken.name}"]
    listed = gamma("store", "list", "--store", folder)
    assert "tiny" in listed.stdout
    assert broken.name in listed.stderr


def test_the_log_is_json_and_an_end_is_clean(store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--store", store) as service:
        service.post("/v1/allocations", {"model": "tiny", "average_bits": 5.5})
    lines = (tmp_path / "log").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines if line.startswith("{")]
    assert events[:2] in (["ready", "listening"], ["listening", "ready"])
    assert "request" in events
    assert not [line for line in lines if "Traceback" in line or "leaked" in line]
    assert service.process.returncode in (0, -signal.SIGTERM)  # uvicorn ends as it was told to
