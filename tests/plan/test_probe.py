"""Records of `gamma probe`: found by device, version, model and traffic, and put into plans."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.plan import PlanRequest, find_gpu, make_plan, probe_records
from allocator.plan.probe_records import ProbeRecord, find_record, model_config_digest, probed_lines, record_path
from allocator.plan.weights import read_model

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
MODEL, OTHER = (read_model(str(CONFIGS / f"{name}.json")) for name in ("qwen3-8b", "qwen3-14b"))
REQUEST = PlanRequest(max_model_len=8192, max_num_seqs=4)
MIB = 2**20


def record(device="NVIDIA GeForce RTX 4090", vllm="0.33.0", request=REQUEST, **changes):
    rank = {
        "rank": 0, "total": 24_000 * MIB, "requested": 22_000 * MIB, "weights": 4_000 * MIB, "loaded": 4_010 * MIB,
        "consumed": 4_110 * MIB, "activations": 300 * MIB, "graphs": 50 * MIB, "available": 17_000 * MIB,
        "kv_cache": 17_000 * MIB, "num_blocks": 100, "block_size": 16,
    }  # fmt: skip
    return ProbeRecord(
        device=device, device_type="cuda", vllm=vllm, torch="2.13.0", model="Qwen3-8B",
        config_digest=model_config_digest(MODEL.shape.config), request=request, max_num_batched_tokens=2048,
        ranks=[rank | changes], seconds=30.0,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and an installed vLLM 0.33.0."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe_records, "installed_vllm", lambda: "0.33.0")
    return probe_records.probe_folder()


def test_a_record_replaces_the_lines_of_the_same_request(folder):
    found = record()
    found.write(record_path(found))
    names = [find_gpu("rtx4090").name]
    assert find_record(names, MODEL.shape.config, REQUEST) == found
    lines = probed_lines(found, MODEL.shape.config, REQUEST)
    plan = make_plan(MODEL.shape, find_gpu("rtx4090"), REQUEST, probe=lines)
    assert plan.line("activations").nbytes == 300 * MIB
    assert plan.line("non-torch").nbytes == 100 * MIB
    assert plan.line("slack").nbytes == 10 * MIB
    assert {plan.line(name).basis for name in lines} == {"probe"}
    free = make_plan(MODEL.shape, find_gpu("rtx4090"), REQUEST)
    assert free.line("activations").basis != "probe"
    measured, predicted = (sum(p.line(name).nbytes for name in lines) for p in (plan, free))
    assert plan.weight_budget_bytes - free.weight_budget_bytes == predicted - measured


def test_another_model_or_other_traffic_takes_only_what_depends_on_neither(folder):
    found = record()
    found.write(record_path(found))
    names = ["RTX 4090"]
    longer = REQUEST.model_copy(update={"max_num_seqs": 64})
    for config, request in ((OTHER.shape.config, REQUEST), (MODEL.shape.config, longer)):
        assert find_record(names, config, request) == found
        assert probed_lines(found, config, request) == {"non-torch": 100 * MIB}
    two = REQUEST.model_copy(update={"tensor_parallel_size": 2})
    assert probed_lines(found, MODEL.shape.config, two) == {}
    batched = REQUEST.model_copy(update={"max_num_batched_tokens": 4096})
    assert probed_lines(found, MODEL.shape.config, batched).keys() == {"non-torch"}


@pytest.mark.parametrize("changes", [{"device": "NVIDIA L4"}, {"vllm": "0.32.0"}])
def test_another_device_or_version_does_not_count(folder, changes):
    found = record(**changes)
    found.write(record_path(found))
    (folder / "rtx_4090-broken.json").write_text("{")
    assert find_record(["RTX 4090"], MODEL.shape.config, REQUEST) is None


def test_a_new_probe_of_the_same_replaces_the_old(folder):
    old, new = record(), record(activations=400 * MIB)
    assert record_path(old) == record_path(new)
    assert record_path(old) != record_path(record(request=REQUEST.model_copy(update={"max_num_seqs": 5})))


def test_gamma_plan_takes_a_record(folder, tmp_path):
    path = tmp_path / "record.json"
    record().write(path)

    def plan(*more):
        command = [sys.executable, "-m", "allocator.cli.main", "plan", CONFIGS / "qwen3-8b.json", "--gpu", "rtx4090"]
        command += ["--max-model-len", "8192", "--max-num-seqs", "4", "--json", *more]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        return {line["name"]: line for line in json.loads(done.stdout)["lines"]}

    line = plan("--probe", path)["activations"]
    assert (line["nbytes"], line["basis"]) == (300 * MIB, "probe")
    assert plan("--probe", "none")["activations"]["basis"] == "formula"
