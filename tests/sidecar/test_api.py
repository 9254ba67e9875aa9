"""The API as a client meets it: a real service over HTTP."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.manifest import Manifest
from allocator.fitting import PlanRequest, find_gpu, make_plan
from allocator.inventory.shape import read_shape

from .conftest import gamma
from .scores import CONFIG, random_scores
from .serving import Running


def test_models_are_listed(sidecar: Running) -> None:
    found = {m["name"]: m for m in sidecar.get("/v1/models")["data"]}
    assert found.keys() == {"tiny", "Qwen3-32B"}
    assert found["Qwen3-32B"]["modules"] == 64 * 7 + 2
    assert 10 < found["Qwen3-32B"]["feasible_bytes"][0] / 2**30 < 11


@pytest.mark.parametrize(
    ("request_", "arguments"),
    [
        ({"budget": "200kB"}, ["--budget", "200kB"]),
        ({"average_bits": 4}, ["--average-bits", "4"]),
        (
            {"budget": "220_000", "pins": {"*.0.*": 8}, "floors": {"*.mlp.*": 3}, "fusion": "tied"},
            ["--budget", "220_000", "--pin", "*.0.*=8", "--floor", "*.mlp.*=3", "--fusion", "tied"],
        ),
    ],
)
def test_answers_equal_the_command_line_byte_for_byte(
    sidecar: Running, learned: tuple[Path, Path], tmp_path: Path, request_: dict, arguments: list[str]
) -> None:
    allocation = sidecar.post("/v1/allocations", {"model": "tiny"} | request_)
    gamma("solve", learned[1] / "scores.json", *arguments, "--out", tmp_path / "manifest.json")
    written = (tmp_path / "manifest.json").read_bytes()
    manifest = Manifest.read(tmp_path / "manifest.json")
    assert allocation["manifest_digest"] == manifest.digest
    assert allocation["tensor_bytes"] == manifest.tensor_bytes
    for path in (f"/v1/allocations/{allocation['id']}/manifest", f"/v1/manifests/{manifest.digest}"):
        assert sidecar.http.get(path).content == written


def test_so_do_answers_for_hardware(sidecar: Running, tmp_path: Path) -> None:
    hardware = {"gpu": "rtx4090", "max_model_len": 8192, "kv_cache_dtype": "fp8"}
    allocation = sidecar.post("/v1/allocations", {"model": "Qwen3-32B", "plan": hardware})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    random_scores().write(tmp_path / "scores.json")
    options = ["--gpu", "rtx4090", "--max-model-len", "8192", "--kv-cache-dtype", "fp8"]
    gamma("plan", tmp_path / "config.json", *options, "--out", tmp_path / "plan.json")
    gamma("solve", tmp_path / "scores.json", "--plan", tmp_path / "plan.json", "--out", tmp_path / "manifest.json")
    manifest = sidecar.http.get(f"/v1/allocations/{allocation['id']}/manifest").content
    assert manifest == (tmp_path / "manifest.json").read_bytes()


def test_the_same_request_has_the_same_id_and_answer(sidecar: Running) -> None:
    bodies = [{"model": "Qwen3-32B", "budget": "18GiB"}, {"budget": "18GiB", "model": "Qwen3-32B", "fusion": "free"}]
    answers = {sidecar.http.post("/v1/allocations", json=b).content for b in bodies for _ in range(2)}
    assert len(answers) == 1
    allocation = json.loads(answers.pop())
    assert sidecar.get(f"/v1/allocations/{allocation['id']}") == allocation
    assert allocation["proof"]["gap"] == 0
    assert allocation["tensor_bytes"] <= allocation["budget_bytes"] == 18 << 30
    by_digest = sidecar.post("/v1/allocations", {"model": allocation["scores_digest"], "budget": "18GiB"})
    assert by_digest["manifest_digest"] == allocation["manifest_digest"]


def test_many_clients_at_once_get_one_answer(sidecar: Running) -> None:
    body = {"model": "Qwen3-32B", "average_bits": 3.03}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: httpx.post(sidecar.url + "/v1/allocations", json=body, timeout=60), range(16))
        )
    assert {a.status_code for a in answers} == {200}
    assert len({a.content for a in answers}) == 1


def test_a_sweep_falls_with_size_and_beats_one_width_for_all(sidecar: Running) -> None:
    curve = sidecar.post("/v1/sweeps", {"model": "tiny", "points": 9})
    sizes = [p["budget_bytes"] for p in curve["points"]]
    losses = [p["predicted_loss"] for p in curve["points"]]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert set(curve["uniform"]) == {"2", "3", "4", "5", "6", "8", "16"}
    four = curve["uniform"]["4"]
    best = sidecar.post("/v1/allocations", {"model": "tiny", "budget": str(four["tensor_bytes"])})
    assert best["predicted_loss"] <= four["predicted_loss"]


def test_a_diff_names_what_changed(sidecar: Running) -> None:
    small, large = (sidecar.post("/v1/allocations", {"model": "tiny", "average_bits": b}) for b in (3, 6))
    document = sidecar.post("/v1/diff", {"before": small["manifest_digest"], "after": large["manifest_digest"]})
    assert document["tensor_bytes_change"] == large["tensor_bytes"] - small["tensor_bytes"]
    assert document["predicted_loss_change"] < 0
    assert document["changed"]
    whole = sidecar.get(f"/v1/manifests/{small['manifest_digest']}")
    assert sidecar.post("/v1/diff", {"before": whole, "after": large["manifest_digest"]}) == document


def test_a_checkpoint_is_made_and_is_the_one_of_the_command_line(
    sidecar: Running, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    model, work = learned
    allocation = sidecar.post("/v1/allocations", {"model": "tiny", "average_bits": 3.5})
    job = sidecar.post("/v1/checkpoints", {"manifest": allocation["manifest_digest"]}, 202)
    assert sidecar.post("/v1/checkpoints", {"manifest": allocation["manifest_digest"]}, 202)["id"] == job["id"]
    done = sidecar.finished(job["id"])
    assert done["state"] == "succeeded"
    assert done["progress"] == 1
    folder = Path(done["checkpoint"])
    _, manifest = check_checkpoint(folder)
    assert manifest.digest == allocation["manifest_digest"]
    gamma("solve", work / "scores.json", "--average-bits", "3.5", "--out", tmp_path / "m.json")
    gamma("export", model, "--manifest", tmp_path / "m.json", "--bank", work / "bank", "--out", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    again = sidecar.post("/v1/checkpoints", {"manifest": allocation["manifest_digest"]}, 202)
    assert again["state"] == "succeeded"


def test_a_plan_says_what_is_left_and_an_allocation_for_it_fits(sidecar: Running) -> None:
    hardware = {"gpu": "rtx-4090", "max_model_len": 8192}
    plan = sidecar.post("/v1/plans", {"model": "Qwen3-32B"} | hardware)
    assert plan["verdict"]["fits"]
    assert plan["device"]["name"] == "NVIDIA GeForce RTX 4090"
    allocation = sidecar.post("/v1/allocations", {"model": "Qwen3-32B", "plan": hardware})
    assert allocation["weight_budget_bytes"] == plan["weight_budget_bytes"]
    manifest = Manifest.parse(sidecar.get(f"/v1/allocations/{allocation['id']}/manifest"), "answer")
    device, request = find_gpu("rtx-4090"), PlanRequest(max_model_len=8192)
    filled = make_plan(read_shape(CONFIG), device, request, formats=manifest.modules)
    assert filled.verdict.fits
    assert filled.planned is not None
    assert filled.planned.weight_bytes <= plan["weight_budget_bytes"] * 1.0
    assert filled.planned.weight_bytes > plan["weight_budget_bytes"] * 0.998
    # These scores have the vocabulary at 16 bits only; config.json alone would promise the smallest without it.
    smallest = sidecar.get("/v1/models")["data"]
    low = next(m["feasible_bytes"][0] for m in smallest if m["name"] == "Qwen3-32B")
    assert low <= plan["smallest_weight_bytes"] < 1.01 * low
    unfit = sidecar.post("/v1/plans", {"model": "Qwen3-32B", "gpu_memory": "12GiB"})
    assert not unfit["verdict"]["fits"]
    error = sidecar.post("/v1/allocations", {"model": "Qwen3-32B", "plan": {"gpu_memory": "12GiB"}}, 422)["error"]
    assert error["type"] == "infeasible_budget"


def test_gpus_are_listed(sidecar: Running) -> None:
    gpus = {gpu["id"]: gpu for gpu in sidecar.get("/v1/gpus")["data"]}
    assert gpus["l4"]["memory_bytes"] > 20 << 30
    assert any("1g.10gb" in gpu["mig"] for gpu in gpus.values())


@pytest.mark.parametrize(
    ("path", "body", "code", "kind", "param"),
    [
        ("/v1/allocations", b"{", 400, "invalid_json", None),
        ("/v1/allocations", b"\xff\xfe", 400, "invalid_json", None),
        ("/v1/allocations", b"[" * 5000, 400, "invalid_json", None),
        ("/v1/allocations", b"1" * 5000, 400, "invalid_json", None),
        ("/v1/allocations", {"model": "tiny"}, 422, "invalid_schema", None),
        ("/v1/allocations", {"model": "tiny", "budget": 5}, 422, "invalid_schema", "budget"),
        ("/v1/allocations", {"model": "tiny", "budget": "1GiB", "more": 1}, 422, "invalid_schema", "more"),
        ("/v1/allocations", {"model": "tiny", "average_bits": "4"}, 422, "invalid_schema", "average_bits"),
        ("/v1/allocations", {"model": "tiny", "budget": "1parsec"}, 400, "invalid_request", "budget"),
        ("/v1/allocations", {"model": "tiny", "budget": "1kB"}, 422, "infeasible_budget", "budget"),
        ("/v1/allocations", {"model": "tiny", "budget": "1MB", "pins": {"zz": 4}}, 400, "invalid_request", "pins"),
        ("/v1/allocations", {"model": "tiny", "budget": "1MB", "pins": {"*": 7}}, 422, "invalid_schema", "pins.*"),
        ("/v1/allocations", {"model": "nothing", "budget": "1MB"}, 404, "not_found", "model"),
        ("/v1/allocations", {"model": "../../etc", "budget": "1MB"}, 422, "invalid_schema", "model"),
        ("/v1/allocations", {"model": "http://x/y", "budget": "1MB"}, 422, "invalid_schema", "model"),
        ("/v1/allocations", [], 422, "invalid_schema", None),
        ("/v1/plans", {"model": "tiny", "gpu": "riva tnt"}, 400, "invalid_request", "gpu"),
        ("/v1/plans", {"model": "tiny"}, 422, "invalid_schema", None),
        (
            "/v1/plans",
            {"model": "tiny", "gpu": "l4", "max_model_len": 1 << 20},
            400,
            "invalid_request",
            "max_model_len",
        ),
        ("/v1/sweeps", {"model": "tiny", "points": 1000}, 422, "invalid_schema", "points"),
        ("/v1/sweeps", {"model": "tiny", "smallest": "1GiB", "largest": "1kB"}, 400, "invalid_request", "smallest"),
        ("/v1/diff", {"before": {}, "after": {}}, 400, "invalid_request", None),
        ("/v1/diff", {"before": "sha256:" + "0" * 64, "after": {}}, 404, "not_found", "id"),
        ("/v1/checkpoints", {"manifest": "sha256:" + "0" * 64}, 404, "not_found", "manifest"),
        ("/v1/checkpoints", {"manifest": "../x"}, 422, "invalid_schema", "manifest"),
    ],
)
def test_mistakes_get_their_status_and_name_the_parameter(
    sidecar: Running, path: str, body: object, code: int, kind: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = sidecar.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == code, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"type", "message", "param"}
    assert (error["type"], error["param"]) == (kind, param), error


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nothing", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/allocations", 405),
        ("GET", "/v1/allocations/..%2f..%2fetc%2fpasswd", 404), ("GET", "/v1/jobs/sha256:" + "0" * 64, 404),
        ("GET", "/v1/allocations/x", 422), ("GET", "/v1/manifests/sha256:" + "A" * 64, 422),
        ("GET", "/console/../app.py", 404), ("GET", "/v1/models/", 404),
    ],
)  # fmt: skip
def test_other_paths_and_methods_are_errors_of_the_same_shape(
    sidecar: Running, method: str, path: str, code: int
) -> None:
    answer = sidecar.http.request(method, path)
    assert answer.status_code == code
    assert answer.json()["error"].keys() == {"type", "message", "param"}
    assert code != 405 or answer.headers["Allow"]


def test_every_answer_has_a_request_id_and_security_headers(sidecar: Running) -> None:
    for path in ("/", "/healthz", "/v1/models", "/nothing"):
        headers = sidecar.http.get(path).headers
        assert len(headers["X-Request-Id"]) == 32
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert sidecar.http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    lines = [json.loads(line) for line in sidecar.log.read_text().splitlines()]
    assert any(line.get("request_id") and line["event"] == "request" and line["status"] == 404 for line in lines)
