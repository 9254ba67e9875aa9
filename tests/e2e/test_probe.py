"""`gamma probe` against vLLM's CPU backend: a real start with dummy weights, and what every rank says of its memory."""

import json
import subprocess
import sys

import pytest

from allocator.plan.probe_records import ProbeRecord


@pytest.mark.slow
def test_a_checkpoint_is_probed_without_its_weights(checkpoints, environment, tmp_path):
    gamma_checkpoint, _ = checkpoints("demo")
    folder = tmp_path / "planned"  # config and manifest alone: what is planned and not yet exported
    folder.mkdir()
    for name in ("config.json", "gamma_manifest.json"):
        (folder / name).write_bytes((gamma_checkpoint / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    options = ["--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "256", "--enforce-eager"]
    options += ["--gpu-memory-utilization", "0.1"]
    command = [sys.executable, "-m", "allocator.cli.main", "probe", folder, *options, "--json"]
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables = environment | caches | {"GAMMA_KERNEL": "torch", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    kept = list((tmp_path / "cache/gamma/probes").glob("*.json"))
    assert [str(path) for path in kept] == [json.loads(done.stdout)["path"]]
    record = ProbeRecord.read(kept[0])
    (rank,) = record.ranks
    assert record.request.max_num_seqs == 2
    assert record.max_num_batched_tokens == 256
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
    assert rank.kv_cache == rank.num_blocks * rank.block_size * token_bytes
    quantized = [m for m in config["quantization_config"]["modules"].values() if m["num_bits"] < 16]
    assert rank.weights >= sum(m["shape"][0] * m["shape"][1] * m["num_bits"] // 8 for m in quantized)
    assert 0 < rank.activations < rank.consumed
    assert record.lines["activations"] == rank.activations


def test_what_vllm_would_refuse_is_refused_before_it_starts(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "vocab_size": 128, "max_position_embeddings": 64, "tie_word_embeddings": True,
        })
    )  # fmt: skip
    options = ["--max-model-len", "4096", "--gpu-memory-utilization", "0.1", "--record", tmp_path / "record.json"]
    command = [sys.executable, "-m", "allocator.cli.main", "probe", tmp_path, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--max-model-len 4096" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "record.json").exists()
