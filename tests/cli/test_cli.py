"""The command line as a user meets it: real runs of `gamma`, its output, files and exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.manifest import Manifest

SMALL = ["--group-size", "32", "--quantizer", "rtn", "--sequences", "4", "--sequence-length", "32"]
VERBS = [
    "warmup",
    "inspect",
    "learn",
    "solve",
    "refine",
    "tune",
    "export",
    "fit",
    "show",
    "diff",
    "sweep",
    "probe",
    "kv",
    "verify",
    "store",
    "prepare",
    "schema",
]


def gamma(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb: str) -> None:
    assert f"gamma {verb} " in gamma(verb, "--help").stdout.split("examples:")[1]


def test_inspect_is_complete(tiny_model: Callable[[str], Path]) -> None:
    document = json.loads(gamma("inspect", tiny_model("llama"), "--group-size", 32, "--json").stdout)
    assert len(document["modules"]) == 2 * 7 + 2
    q = document["modules"]["model.layers.1.self_attn.q_proj"]
    assert q["fused_group"] == "model.layers.1.self_attn.qkv_proj"
    assert list(q["nbytes"]) == ["2", "3", "4", "5", "6", "8", "16"]
    assert "feasible budgets" in gamma("inspect", tiny_model("llama")).stdout


def test_a_number_of_channel_blocks_needs_the_granularity(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["learn", tiny_model("llama"), "--out", tmp_path / "work", "--channel-blocks", 4]
    assert "counts only with --granularity channel-block" in gamma(*command, code=2).stderr
    done = gamma(*command[:-2], "--granularity", "channel-block", "--channel-blocks", 7, code=2)
    assert "--channel-blocks 7 does not divide the intermediate size 96" in done.stderr


def test_the_four_steps_and_the_one_step_give_the_same_checkpoint(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen3")
    learned = json.loads(gamma("learn", model, "--out", tmp_path / "work", *SMALL, "--json").stdout)
    low, high = learned["feasible_bytes"]
    budget = (2 * low + high) // 3
    manifest = tmp_path / "manifest.json"
    solved = gamma("solve", tmp_path / "work/scores.json", "--budget", budget, "--out", manifest).stdout
    assert f"{budget:,} bytes" in solved
    out = tmp_path / "stepwise"
    report = json.loads(
        gamma("export", model, "--manifest", manifest, "--bank", tmp_path / "work/bank", "--out", out, "--json").stdout
    )
    assert report["predicted_file_bytes"] == report["written_file_bytes"]
    fitted = json.loads(gamma("fit", model, "--budget", budget, "--out", tmp_path / "fit", *SMALL, "--json").stdout)
    assert fitted["manifest"]["digest"] == Manifest.read(manifest).digest
    for name in ("model.safetensors", "config.json", "gamma_manifest.json"):
        assert (tmp_path / "fit" / name).read_bytes() == (out / name).read_bytes()
    assert "is what it declares" in gamma("verify", out).stdout
    _, checked = check_checkpoint(out)
    assert checked.tensor_bytes <= budget


def test_average_bits_are_met_from_below(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    gamma("learn", tiny_model("llama"), "--out", tmp_path, *SMALL)
    manifest = json.loads(gamma("solve", tmp_path / "scores.json", "--average-bits", 4.0, "--json").stdout)
    modules = manifest["modules"]
    stored = sum(manifest["module_bytes"][name] for name in modules)
    weights = sum(m["shape"][0] * m["shape"][1] for m in modules.values())
    assert 3.9 < 8 * stored / weights <= 4.0


def test_rules_are_kept(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    gamma("learn", tiny_model("llama"), "--out", tmp_path, *SMALL)
    rules = ["--pin", "*.0.*.o_proj=8", "--ceiling", "*.mlp.*=4", "--floor", "*.1.self_attn.*=5", "--fusion", "tied"]
    manifest = json.loads(gamma("solve", tmp_path / "scores.json", "--average-bits", 5, *rules, "--json").stdout)
    widths = {name: m["num_bits"] for name, m in manifest["modules"].items()}
    assert widths["model.layers.0.self_attn.o_proj"] == 8
    assert all(bits <= 4 for name, bits in widths.items() if ".mlp." in name)
    assert all(bits >= 5 for name, bits in widths.items() if ".layers.1.self_attn." in name)
    for block in (0, 1):
        assert len({widths[f"model.layers.{block}.self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert len({widths[f"model.layers.{block}.mlp.{p}_proj"] for p in ("gate", "up")}) == 1
    unknown = gamma("solve", tmp_path / "scores.json", "--average-bits", 5, "--pin", "nothing=4", code=2)
    assert "nothing" in unknown.stderr
    assert "PATTERN=BITS" in gamma("solve", "x", "--average-bits", 5, "--pin", "a=7", code=2).stderr


def test_a_budget_that_cannot_be_met_names_the_range(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for arguments in (["fit", tiny_model("llama"), "--out", tmp_path / "out", *SMALL],):
        message = gamma(*arguments, "--budget", "10KiB", code=4).stderr
        assert "feasible are" in message
    assert list(tmp_path.iterdir()) == []  # refused before anything was computed
    gamma("learn", tiny_model("llama"), "--out", tmp_path / "work", *SMALL)
    assert "feasible are" in gamma("solve", tmp_path / "work/scores.json", "--budget", "10KiB", code=4).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/nonexistent"], "no such folder"),
        (["solve", "/nonexistent/scores.json", "--budget", "1GiB"], "no such file"),
        (["verify", "/nonexistent"], "no such file"),
        (["inspect", "."], "config.json"),
        (["solve", "x.json"], "--budget --average-bits"),
        (["solve", "x.json", "--budget", "1GiB", "--average-bits", "3"], "not allowed with"),
        (["learn", "m", "--out", "w", "--widths", "2,7"], "allowed are 2,3,4,5,6,8,16"),
        (["learn", "m", "--out", "w", "--sequences", "0"], "must be greater than 0"),
        (["tune", "m", "--model", "m", "--bank", "b", "--out", "w", "--scale-steps", "-1"], "must be 0 or more"),
        (["learn", "m", "--out", "w"], "no such folder"),
        (["schema", "nothing"], "invalid choice"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode in (2, 3)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_quantizer_is_refused_before_work(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    done = gamma("learn", tiny_model("llama"), "--out", tmp_path / "w", "--quantizer", "magic", code=2)
    assert "choose from rtn, mse, gptq" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["bank", "scores", "manifest", "checkpoint", "plan", "gpus", "probe", "kv_cache", "share"]
)
def test_schemas_are_published(name: str) -> None:
    assert json.loads(gamma("schema", name).stdout)["properties"]


def test_what_is_written_meets_the_published_schema(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    gamma("learn", tiny_model("llama"), "--out", tmp_path, *SMALL)
    gamma("solve", tmp_path / "scores.json", "--average-bits", 4, "--out", tmp_path / "manifest.json")
    files = {"bank": "bank/bank.json", "scores": "scores.json", "manifest": "manifest.json"}
    for name, path in files.items():
        schema = json.loads(gamma("schema", name).stdout)
        jsonschema.validate(json.loads((tmp_path / path).read_text()), schema)


def test_a_missing_extra_is_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """An installation without the extra `learn`: inspecting works, learning says what to install."""
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, safetensors=None)\n"
        "from allocator.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )

    def bare(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert bare("inspect", tiny_model("llama")).returncode == 0
    learning = bare("learn", tiny_model("llama"), "--out", tmp_path / "work", *SMALL)
    assert learning.returncode == 2
    assert "gamma-vllm[learn]" in learning.stderr
    assert "Traceback" not in learning.stderr


def test_lines_of_progress_go_to_stderr_and_results_to_stdout(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    command = ["fit", tiny_model("llama"), "--average-bits", 4, "--out", tmp_path / "out", *SMALL]
    done = gamma(*command, "--progress", "json", "--json")
    assert json.loads(done.stdout)["manifest"]["digest"]
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    steps = [line["step"] for line in lines if "step" in line]
    begun = list(dict.fromkeys(steps))
    planned = next(line["then"] for line in lines if line.get("step") == "candidates")
    assert {"measuring", "measuring the vocabulary", "solving", "writing"} <= set(planned)
    assert begun[begun.index("candidates") + 1 :] == planned
    assert all(line["resident_bytes"] > 2**20 and line["done"] <= line["total"] for line in lines if "step" in line)
    assert {"message": "calibration: 4 sequences of 32 tokens"} in lines
    run = json.loads((tmp_path / "out-work" / "run.json").read_text())
    assert (run["calibration"]["sequences"], run["calibration"]["sequence_length"]) == (4, 32)
    again = gamma(*command, "--overwrite", "--progress", "none")
    assert again.stderr == ""
