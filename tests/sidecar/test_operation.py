"""What operators rely on: a light start, metrics, --node, what is logged."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allocator.contract.checkpoint import check_checkpoint

from .conftest import gamma
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


def test_starting_costs_little() -> None:
    """Processor time, so that a busy machine does not count: parsing, imports, the app, until it would listen."""
    code = (
        "import sys, time; from allocator.sidecar.app import create_app;"
        "from allocator.sidecar.settings import ServiceSettings; create_app(ServiceSettings(store=sys.argv[1]));"
        "assert not {'torch', 'vllm', 'transformers', 'ortools', 'opentelemetry'} & set(sys.modules);"
        "print(time.process_time())"
    )
    command = [sys.executable, "-c", code, os.curdir]
    fastest = min(float(subprocess.check_output(command, text=True)) for _ in range(3))
    assert fastest < 2


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
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_node_prepares_itself_and_is_ready_then(tiny_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    flags = ["--store", tiny_store, "--node", "tiny", "--out", out, "--budget", "4bits", "--read-only"]
    with running(tmp_path / "log", *flags) as service:
        assert service.http.get("/readyz").status_code in (200, 503)
        deadline = time.monotonic() + 120
        while service.http.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
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
        deadline = time.monotonic() + 120
        while service.get("/v1/node")["state"] == "preparing":
            assert time.monotonic() < deadline
            time.sleep(0.1)
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


def test_the_log_is_json_and_an_end_is_clean(store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--store", store) as service:
        service.post("/v1/allocations", {"model": "tiny", "average_bits": 5.5})
    lines = (tmp_path / "log").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines if line.startswith("{")]
    assert events[:2] in (["ready", "listening"], ["listening", "ready"])
    assert "request" in events
    assert not [line for line in lines if "Traceback" in line or "leaked" in line]
    assert service.process.returncode in (0, -signal.SIGTERM)  # uvicorn ends as it was told to
