"""The API as a client meets it: a real service over HTTP."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.manifest import Manifest
from allocator.model.shape import read_shape
from allocator.plan import PlannedWeights, PlanRequest, find_gpu, make_plan

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
    filled = make_plan(read_shape(CONFIG), device, request, weights=PlannedWeights(formats=manifest.modules))
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


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_sent_as_json_is_told_so(sidecar: Running, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = sidecar.http.post("/v1/plans", content=b'{"model": "tiny", "gpu": "l4"}', headers=headers)
    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_one_amount_in_other_words_is_one_manifest(
    sidecar: Running, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    made = [sidecar.post("/v1/allocations", {"model": "tiny", "budget": b}) for b in ("0.2MB", "200000", "200_000")]
    assert len({(one["id"], one["manifest_digest"]) for one in made}) == 1
    assert made[0]["request"]["budget"] == "200000"
    bits = [
        sidecar.post("/v1/allocations", {"model": "tiny"} | b) for b in ({"budget": "3.5bits"}, {"average_bits": 3.5})
    ]
    assert bits[0] == bits[1]
    for budget in ("0.2MB", "200000"):
        gamma("solve", learned[1] / "scores.json", "--budget", budget, "--out", tmp_path / budget)
        assert Manifest.read(tmp_path / budget).digest == made[0]["manifest_digest"]
    gamma("solve", learned[1] / "scores.json", "--budget", "3.5bits", "--out", tmp_path / "bits")
    assert Manifest.read(tmp_path / "bits").digest == bits[0]["manifest_digest"]


def test_average_bits_of_one_manifest_are_the_same_everywhere(sidecar: Running) -> None:
    body = {"model": "tiny", "average_bits": 3.5}
    allocation = sidecar.post("/v1/allocations", body)
    digest = allocation["manifest_digest"]
    side = sidecar.post("/v1/diff", {"before": digest, "after": digest})["before"]
    assert side["average_bits"] == pytest.approx(allocation["average_bits"])
    assert side["block_bits"] != pytest.approx(side["average_bits"])
    size = str(allocation["tensor_bytes"])
    first = sidecar.post("/v1/sweeps", {"model": "tiny", "smallest": size, "points": 2})["points"][0]
    assert first["average_bits"] == pytest.approx(allocation["average_bits"])


def test_an_id_of_one_kind_finds_nothing_of_another(sidecar: Running) -> None:
    allocation = sidecar.post("/v1/allocations", {"model": "tiny", "average_bits": 3.9})
    curve = sidecar.post("/v1/sweeps", {"model": "tiny", "points": 2})
    for path in (f"/v1/manifests/{allocation['id']}", f"/v1/allocations/{allocation['manifest_digest']}"):
        sidecar.get(path, 404)
    sidecar.get(f"/v1/allocations/{curve['id']}", 404)
    sidecar.post("/v1/diff", {"before": allocation["id"], "after": allocation["id"]}, 404)


def test_a_fit_is_the_plan_the_allocation_and_the_manifest(sidecar: Running) -> None:
    hardware = {"gpu": "rtx4090", "max_model_len": 8192}
    whole = sidecar.post("/v1/fits", {"model": "Qwen3-32B", "hardware": hardware})
    assert whole["plan"] == sidecar.post("/v1/plans", {"model": "Qwen3-32B"} | hardware)
    allocation = sidecar.post("/v1/allocations", {"model": "Qwen3-32B", "plan": hardware})
    text = whole["allocation"].pop("manifest")
    assert whole["allocation"] == allocation
    digest = allocation["manifest_digest"]
    assert text == sidecar.http.get(f"/v1/manifests/{digest}").text
    assert whole["planned"] == sidecar.post("/v1/plans", {"model": "Qwen3-32B", "manifest": digest} | hardware)
    small = sidecar.post("/v1/fits", {"model": "Qwen3-32B", "hardware": {"gpu_memory": "12GiB"}})
    assert not small["plan"]["verdict"]["fits"]
    models = {m["name"]: m for m in sidecar.get("/v1/models")["data"]}
    assert small["allocation"]["budget_bytes"] == models["Qwen3-32B"]["feasible_bytes"][0]


def test_what_is_stored_is_listed_in_parts_and_deleted(sidecar: Running) -> None:
    made = [sidecar.post("/v1/allocations", {"model": "tiny", "budget": str(190_000 + i)}) for i in range(3)]
    for path, key in (("/v1/allocations", "id"), ("/v1/manifests", "manifest_digest")):
        found, after = [], ""
        while after is not None:
            part = sidecar.get(f"{path}?limit=2{after}")
            assert len(part["data"]) <= 2
            found += [one["id"] for one in part["data"]]
            after = f"&after={part['next']}" if part["next"] else None
        assert found == sorted(set(found))
        assert {one[key] for one in made} <= set(found)
    first = made[0]
    digest = first["manifest_digest"]
    refused = sidecar.http.delete(f"/v1/manifests/{digest}")
    assert refused.status_code == 409
    assert first["id"] in refused.json()["error"]["message"]
    for path in (f"/v1/allocations/{first['id']}", f"/v1/manifests/{digest}"):
        assert sidecar.http.delete(path).json()["deleted"]
        assert sidecar.http.delete(path).status_code == 404
        sidecar.get(path, 404)
    assert sidecar.post("/v1/allocations", {"model": "tiny", "budget": "190000"}) == first


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
        ("/v1/allocations", {"model": "tiny", "budget": "0.5bits"}, 422, "infeasible_budget", "average_bits"),
        (
            "/v1/allocations",
            {"model": "tiny", "plan": {"gpu_memory": "-5GiB"}},
            400,
            "invalid_request",
            "plan.gpu_memory",
        ),
        ("/v1/plans", {"model": "tiny", "gpu_memory": "-5GiB"}, 400, "invalid_request", "gpu_memory"),
        ("/v1/fits", {"model": "tiny", "hardware": {"gpu": "riva tnt"}}, 400, "invalid_request", "hardware.gpu"),
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
        ("/v1/diff", {"before": "sha256:" + "0" * 64, "after": {}}, 404, "not_found", "before"),
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
    assert "--" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nothing", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/checkpoints", 405),
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


def test_allow_names_every_method_of_a_path(sidecar: Running) -> None:
    assert sidecar.http.put("/v1/allocations").headers["Allow"] == "GET, POST"
    assert sidecar.http.put("/v1/jobs/sha256:" + "0" * 64).headers["Allow"] == "DELETE, GET"


def test_every_answer_has_a_request_id_and_security_headers(sidecar: Running) -> None:
    for path in ("/", "/healthz", "/v1/models", "/nothing"):
        headers = sidecar.http.get(path).headers
        assert len(headers["X-Request-Id"]) == 32
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert sidecar.http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    lines = [json.loads(line) for line in sidecar.log.read_text().splitlines()]
    assert any(line.get("request_id") and line["event"] == "request" and line["status"] == 404 for line in lines)
