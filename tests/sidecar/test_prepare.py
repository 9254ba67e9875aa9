"""`gamma prepare`: from a store to a folder that can be served, once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import KvCacheScores
from allocator.plan import Plan
from allocator.run.progress import silent
from allocator.sidecar.choice import Selection, choose, find_entry
from allocator.sidecar.settings import PrepareSettings
from allocator.sidecar.store import Store
from tests.plan.nvml import L4, NEEDED, library

from .conftest import gamma
from .scores import publish_scores


def test_prepare_writes_a_served_folder_and_has_nothing_to_do_the_second_time(
    learned: tuple[Path, Path], tiny_store: Path, tmp_path: Path
) -> None:
    _, work = learned
    out = tmp_path / "served"
    arguments = ["tiny", "--store", tiny_store, "--out", out, "--budget", "4.5bits", "--max-model-len", 64, "--json"]
    first = json.loads(gamma("prepare", *arguments).stdout)
    assert not first["unchanged"]
    solved = json.loads(gamma("solve", work / "scores.json", "--average-bits", "4.5", "--json").stdout)
    assert first["manifest_digest"] == solved["digest"] == Manifest.read(out / "manifest.json").digest
    _, found = check_checkpoint(out / "checkpoint")
    assert found.digest == solved["digest"]
    lines = (out / "vllm.yaml").read_text().splitlines()
    assert lines == [f'model: "{out}/checkpoint"', 'served-model-name: "tiny"', "max-model-len: 64"]
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert json.loads(gamma("prepare", *arguments).stdout)["unchanged"]
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    (out / "checkpoint" / "model.safetensors").unlink()
    assert not json.loads(gamma("prepare", *arguments).stdout)["unchanged"]
    check_checkpoint(out / "checkpoint")
    visible = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert visible == ["checkpoint", "manifest.json", "prepared.json", "vllm.yaml"]


def test_options_come_from_the_environment_and_flags_win(tiny_store: Path, tmp_path: Path) -> None:
    environment = {
        "GAMMA_MODEL": "tiny", "GAMMA_STORE": str(tiny_store), "GAMMA_OUT": str(tmp_path / "a"),
        "GAMMA_BUDGET": "10GiB", "GAMMA_MAX_NUM_SEQS": "3", "GAMMA_SERVED_MODEL_NAME": "chat",
    }  # fmt: skip
    gamma("prepare", "--max-num-seqs", "2", **environment)
    assert (tmp_path / "a/vllm.yaml").read_text().splitlines()[1:] == ['served-model-name: "chat"', "max-num-seqs: 2"]
    wrong = gamma("prepare", code=2, **environment | {"GAMMA_KV_CACHE_DTYPE": "int3"})
    assert "GAMMA_KV_CACHE_DTYPE" in wrong.stderr


def test_memory_of_a_gpu_is_a_gpu_on_any_machine(tmp_path: Path) -> None:
    """Its plan is one for CUDA, where one width a fused layer decodes faster; for a CPU one says --fusion free."""
    publish_scores(tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    entry = find_entry(store, "Qwen3-32B")
    asked = PrepareSettings(model="Qwen3-32B", gpu_memory_bytes=24 << 30, max_model_len=4096, max_num_seqs=1)

    def widths_of(settings: PrepareSettings) -> tuple[set[int], str]:
        """How many widths q, k and v of a block have, over all blocks; the reason."""
        chosen = choose(settings, entry, store, silent)
        bits = {name: form.num_bits for name, form in chosen.manifest.modules.items()}
        blocks = [[bits[f"model.layers.{i}.self_attn.{part}_proj"] for part in "qkv"] for i in range(64)]
        return {len(set(block)) for block in blocks}, chosen.reason

    tied, reason = widths_of(asked)
    assert tied == {1}
    assert "one width a fused layer costs" in reason
    free, _ = widths_of(asked.model_copy(update={"fusion": "free"}))
    assert max(free) > 1


def test_stages_on_other_nodes_are_counted(tmp_path: Path) -> None:
    """Two nodes hold what one cannot, and vLLM is told of both."""
    publish_scores(tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    entry = find_entry(store, "Qwen3-32B")
    one = PrepareSettings(model="Qwen3-32B", gpu="l4", max_model_len=8192, max_num_seqs=4, kv_cache_dtype="fp8")
    two = one.model_copy(update={"pipeline_parallel_size": 2})
    half, whole = (choose(settings, entry, store, silent) for settings in (one, two))
    assert half.manifest.tensor_bytes < 20e9 < whole.manifest.tensor_bytes
    assert "pipeline-parallel-size" not in half.vllm_arguments
    assert whole.vllm_arguments["pipeline-parallel-size"] == 2
    by_bits = choose(two.model_copy(update={"budget": "3bits"}), entry, store, silent)
    assert by_bits.vllm_arguments["pipeline-parallel-size"] == 2


def test_a_stored_manifest_can_be_asked_for(tiny_store: Path, tmp_path: Path) -> None:
    base = ["tiny", "--store", tiny_store, "--json"]
    first = json.loads(gamma("prepare", *base, "--out", tmp_path / "a", "--budget", "5bits").stdout)
    second = json.loads(gamma("prepare", *base, "--out", tmp_path / "b", "--budget", first["manifest_digest"]).stdout)
    assert second["manifest_digest"] == first["manifest_digest"]
    a, b = (tmp_path / name / "checkpoint/model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_what_cannot_be_prepared_says_why(tiny_store: Path, tmp_path: Path) -> None:
    base = ["--store", tiny_store, "--out", tmp_path / "out"]
    assert "it offers tiny" in gamma("prepare", "nothing", *base, "--budget", "1GiB", code=2).stderr
    assert "feasible are" in gamma("prepare", "tiny", *base, "--budget", "10KiB", code=4).stderr
    assert "unit" in gamma("prepare", "tiny", *base, "--budget", "3parsec", code=2).stderr
    assert "--store" in gamma("prepare", "tiny", "--out", tmp_path, code=2).stderr
    assert "has no manifest" in gamma("prepare", "tiny", *base, "--budget", "sha256:" + "0" * 64, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_bank_leaves_no_checkpoint(tiny_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    for file in store.glob("banks/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    refused = gamma("prepare", "tiny", "--store", store, "--out", tmp_path / "out", "--budget", "3bits", code=3)
    assert "sha256" in refused.stderr
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []


def test_a_gpu_by_name_or_memory_is_planned_for(tiny_store: Path, tmp_path: Path) -> None:
    base = ["tiny", "--store", tiny_store, "--out", tmp_path, "--max-model-len", 128, "--json"]
    prepared = json.loads(gamma("prepare", *base, "--gpu", "l4").stdout)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["verdict"]["fits"]
    assert prepared["vllm_arguments"]["max-model-len"] == 128
    assert prepared["vllm_arguments"]["gpu-memory-utilization"] == plan["request"]["gpu_memory_utilization"]
    assert "NVIDIA L4 has" in prepared["reason"]
    assert "does not fit" in gamma("prepare", *base, "--gpu-memory", "300MiB", code=4).stderr
    assert "not known" in gamma("prepare", *base, "--gpu", "riva tnt", code=2).stderr


def test_the_kv_cache_is_chosen_with_the_weights(store: Path) -> None:
    """On a card that leaves about 2.5 bits: a cheap fp8 KV cache buys wider weights, a dear one is left."""
    opened = Store(str(store))
    entry = find_entry(opened, "Qwen3-32B")
    settings = PrepareSettings(
        model="Qwen3-32B", gpu="rtx4090", max_model_len=8192, max_num_seqs=4, kv_cache_dtype="auto-choose"
    )
    with pytest.raises(InputError, match="gamma kv MODEL"):
        choose(settings, entry, opened, silent)
    chosen = {}
    for loss in (1e-6, 1e6):
        measured = KvCacheScores(
            model=entry.model, unit="nats", calibration_digest="sha256:" + "0" * 64, tokens=1, losses={"fp8": loss}
        )
        opened.add_kv_cache(measured)
        assert opened.kv_cache(entry.model.digest) == measured
        chosen[loss] = choose(settings, entry, opened, silent)
    assert chosen[1e-6].vllm_arguments["kv-cache-dtype"] == "fp8"
    assert "kv-cache-dtype" not in chosen[1e6].vllm_arguments
    assert chosen[1e-6].manifest.tensor_bytes > chosen[1e6].manifest.tensor_bytes
    assert chosen[1e-6].reason.startswith("a KV cache of fp8 costs least with its weights (auto ")
    named = choose(settings.model_copy(update={"kv_cache_dtype": "fp8"}), entry, opened, silent)
    assert named.manifest.digest == chosen[1e-6].manifest.digest
    with pytest.raises(InputError, match="--budget 20GiB has shared it out"):
        choose(settings.model_copy(update={"budget": "20GiB"}), entry, opened, silent)


@NEEDED[0]
@NEEDED[1]
def test_the_visible_gpu_is_planned_for_as_if_it_were_named(tiny_store: Path, tmp_path: Path) -> None:
    library(tmp_path, L4)
    base = ["prepare", "tiny", "--store", tiny_store, "--max-model-len", 128, "--json"]
    seen = json.loads(gamma(*base, "--out", tmp_path / "a", LD_LIBRARY_PATH=str(tmp_path)).stdout)
    named = json.loads(gamma(*base, "--out", tmp_path / "b", "--gpu", "l4").stdout)
    assert "NVIDIA L4 has" in seen["reason"]
    assert (seen["reason"], seen["manifest_digest"]) == (named["reason"], named["manifest_digest"])
    # An explicit choice never fails over a driver that does.
    library(tmp_path, L4, init="return *(volatile int *)0;")
    explicit = [*base, "--out", tmp_path / "c", "--budget", "4bits"]
    assert not json.loads(gamma(*explicit, LD_LIBRARY_PATH=str(tmp_path)).stdout)["unchanged"]


def test_without_a_gpu_the_automatic_choice_says_what_to_give(tiny_store: Path, tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        return
    refused = gamma("prepare", "tiny", "--store", tiny_store, "--out", tmp_path / "out", code=2)
    assert "no GPU is visible" in refused.stderr


def choose_with(store: Path, **asked: Any) -> Selection:
    opened = Store(str(store))
    settings = PrepareSettings(model="Qwen3-32B", gpu="l40s", max_model_len=8192, **asked)
    return choose(settings, find_entry(opened, "Qwen3-32B"), opened, silent)


def test_a_server_of_which_no_number_of_requests_was_said_answers_more_than_one(store: Path) -> None:
    """It runs as many as vLLM does by default; the KV cache holds one of the longest, whatever their number."""
    chosen = choose_with(store)
    assert chosen.vllm_arguments["max-num-seqs"] == 256
    assert chosen.plan is not None
    assert chosen.plan.planned is not None
    assert chosen.plan.planned.sequences >= 1
    assert chosen.plan.line("KV cache").note == "1 x 8192 tokens"
    eight = choose_with(store, max_num_seqs=8)
    assert eight.vllm_arguments["max-num-seqs"] == 8
    assert eight.plan is not None
    assert eight.plan.line("KV cache").nbytes > 7 * chosen.plan.line("KV cache").nbytes


def test_on_a_gpu_fused_layers_have_one_width_and_the_price_is_told(store: Path) -> None:
    def widths(choice: Selection) -> list[set[int]]:
        layers: dict[str, set[int]] = {}
        for name, form in choice.manifest.modules.items():
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                layers.setdefault(name.rpartition(".")[0], set()).add(form.num_bits)
        return list(layers.values())

    by_plan = choose_with(store, max_num_seqs=4)
    assert {len(bits) for bits in widths(by_plan)} == {1}
    assert "one width a fused layer costs" in by_plan.reason
    assert "14% of decode" in by_plan.reason
    free = choose_with(store, max_num_seqs=4, fusion="free")
    assert max(len(bits) for bits in widths(free)) > 1
    assert "fused layer" not in free.reason
    by_bits = choose_with(store, budget="3.3bits")
    assert {len(bits) for bits in widths(by_bits)} == {1}
    assert "one width a fused layer costs" in by_bits.reason


def test_adapters_are_counted_and_served(tiny_store: Path, tmp_path: Path) -> None:
    base = ["prepare", "tiny", "--store", tiny_store, "--gpu", "l4", "--max-model-len", 128, "--json"]
    lora = ["--enable-lora", "--max-loras", 3, "--max-lora-rank", 32, "--lora-target-modules", "qkv_proj,o_proj"]
    prepared = json.loads(gamma(*base, *lora, "--out", tmp_path).stdout)
    told = {name: prepared["vllm_arguments"][name] for name in ("enable-lora", "max-loras", "max-lora-rank")}
    assert told == {"enable-lora": True, "max-loras": 3, "max-lora-rank": 32}
    assert 'lora-target-modules: ["qkv_proj", "o_proj"]' in (tmp_path / "vllm.yaml").read_text().splitlines()
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.line("LoRA adapters").nbytes > 0


@pytest.mark.parametrize(
    "argument",
    ["--max-num-seqs=64", "--max_model_len=4096", "-tp=2", "--enable-lora", "--kv-cache-memory-bytes=1000000000"],
)
def test_arguments_for_vllm_that_contradict_the_plan_are_refused(store: Path, argument: str) -> None:
    with pytest.raises(InputError, match="contradicts the plan"):
        choose_with(store, max_num_seqs=4, vllm_args=[argument])


def test_arguments_for_vllm_that_the_plan_does_not_decide_are_taken(store: Path) -> None:
    harmless = ["--enforce-eager", "--tool-call-parser", "hermes", "--max-num-seqs", "4", "--max-model-len=8192"]
    assert choose_with(store, max_num_seqs=4, vllm_args=harmless).plan


def test_ranks_that_do_not_divide_the_model_are_refused_without_a_gpu_too(tiny_store: Path, tmp_path: Path) -> None:
    arguments = ["--store", tiny_store, "--out", tmp_path, "--budget", "4bits", "--tensor-parallel-size", 3]
    refused = gamma("prepare", "tiny", *arguments, "--max-model-len", 64, code=2).stderr
    assert "does not divide the model's" in refused


def test_a_model_of_the_hub_is_taken_in_its_revision(learned: tuple[Path, Path], tmp_path: Path) -> None:
    """A cache of the hub that has two revisions, of which `main` is another model's; nothing is downloaded."""
    model, work = learned
    cached = tmp_path / "hub" / "models--org--tiny"
    for revision, commit in (("v1", "1" * 40), ("main", "2" * 40)):
        shutil.copytree(model, cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
    (cached / "snapshots" / ("2" * 40) / "config.json").write_text("{}")
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    store = tmp_path / "store"
    gamma("store", "add", work, "--model", "hf://org/tiny@v1", "--store", store, "--name", "tiny", **offline)
    (entry,) = Store(str(store)).entries()
    assert (entry.source.location, entry.source.revision) == ("org/tiny", "v1")
    gamma("prepare", "org/tiny", "--store", store, "--out", tmp_path / "out", "--budget", "4bits", **offline)
    check_checkpoint(tmp_path / "out" / "checkpoint")
