"""What vLLM answers from a gamma checkpoint, against Hugging Face transformers with the dequantized weights."""

import json
import math
import os
import shutil

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

pytest.importorskip("vllm")

from allocator.contract.checkpoint import CheckpointConfig  # noqa: E402
from allocator.contract.resident import resident_bytes  # noqa: E402
from gamma_vllm.kernels.ark import ArkKernel  # noqa: E402
from gamma_vllm.kernels.native import NativeKernel  # noqa: E402
from gamma_vllm.kernels.torch_reference import TorchKernel  # noqa: E402
from tests.conftest import TRAINED  # noqa: E402
from tests.e2e.conftest import succeeded  # noqa: E402
from tests.e2e.ranks import TWO_RANKS, needs_two_cores  # noqa: E402
from tests.skips import lacking, lacking_kernel  # noqa: E402
from tests.versions import needs_030  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODELS = [
    "demo",
    "exported",
    "cut",
    "babyllama105",
    "stories260K",
]  # three of Qwen3, two Llamas; in_features 172: 16 bits
TEXT = (
    "Once upon a time there was a little girl named Lily. She liked to play in the park with her friends, and one "
    "day they found a small red ball under the old tree. She said that it was the best day of her life."
)
TOKENS = 24


WHY_NOT = {kernel.name: kernel.why_not(torch.device("cpu")) for kernel in (TorchKernel, ArkKernel, NativeKernel)}
KERNELS = [name for name, reason in WHY_NOT.items() if reason is None]
EVERY_KERNEL = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=lacking_kernel(reason)))
    for name, reason in WHY_NOT.items()
]
FUSED = {f"{n}_proj": "qkv_proj" for n in "qkv"} | {f"{n}_proj": "gate_up_proj" for n in ("gate", "up")}
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.fixture(scope="module")
def prompts(checkpoints):
    """Model name -> token lists: the text whole (scored), and two beginnings of it (continued)."""
    from transformers import AutoTokenizer

    def tokenize(name):
        tokens = AutoTokenizer.from_pretrained(checkpoints(name)[1])(TEXT)["input_ids"][:96]
        return tokens, [tokens[:17], tokens[5:9]]

    return tokenize


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for q, k and v of demo."""
    folder = tmp_path_factory.mktemp("adapter")
    projections = ["q_proj", "k_proj", "v_proj"]
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": projections, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(6):
        for name, rows in zip(projections, (256, 128, 128), strict=True):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory, checkpoints, prompts, adapter, learned, learned_cut, exported, run_engines):
    """All engines of this file, one after the other in one process."""
    folder = tmp_path_factory.mktemp("answers")
    jobs = []

    def add(name, model, steps, **job):
        jobs.append({"name": name, "model": str(model), "steps": steps} | job)

    for model in MODELS:
        if model not in ("demo", "exported", "cut") and not (TRAINED / model).is_dir():
            continue
        gamma, dequantized = checkpoints(model)
        text, beginnings = prompts(model)

        def ask(kind, text=text, beginnings=beginnings, model=model):
            saved = str(folder / f"{model} {kind}.pt")
            score = ["score", {"prompt": text, "save": saved}]
            return [["generate", {"prompts": beginnings, "tokens": TOKENS}], score]

        add(f"{model} transformers", dequantized, ask("transformers"))
        for kernel in KERNELS:
            add(f"{model} {kernel}", gamma, ask(kernel), kernel=kernel)
        if model == "babyllama105" and COMPILER:
            for kernel in KERNELS:
                options = {"enforce_eager": False}
                steps = ask(f"{kernel} compiled")
                add(f"{model} {kernel} compiled", gamma, steps, kernel=kernel, options=options)
        if model == "demo":
            options = {"dtype": "bfloat16"}
            add(f"{model} ark bfloat16", gamma, ask("ark bfloat16"), kernel="ark", options=options)
            generate = ["generate", {"prompts": beginnings, "tokens": TOKENS}]
            parameters = ["parameters", {}]
            for kernel in KERNELS:
                steps = [generate, parameters, ["zero", {}], generate, ["reload", {}], generate, parameters]
                add(f"{model} {kernel} reload", gamma, steps, kernel=kernel)
                steps = [generate, ["reload", {}], parameters]
                add(f"{model} {kernel} dummy", gamma, steps, kernel=kernel, options={"load_format": "dummy"})
            options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
            add(f"{model} two ranks", gamma, [generate], kernel="ark", options=options, environment=TWO_RANKS)
            changed = ["generate", {"prompts": beginnings, "tokens": TOKENS, "lora": str(adapter)}]
            options = {"enable_lora": True, "max_lora_rank": 8}
            add(f"{model} lora", gamma, [generate, changed], kernel="ark", options=options)
        if model == "cut":
            generate = ["generate", {"prompts": beginnings, "tokens": TOKENS}]
            parameters = ["parameters", {}]
            steps = [generate, parameters, ["zero", {}], generate, ["reload", {}], generate, parameters]
            environment = {"GAMMA_MANIFEST": str(learned_cut[1])}
            bank = {"options": {"quantization": "gamma"}, "environment": environment}
            add("cut bank, reloaded", learned_cut[0], steps, kernel="torch", **bank)
            options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
            add("cut two ranks", gamma, [generate], kernel="ark", options=options, environment=TWO_RANKS)
            add("cut lora", gamma, [generate], kernel="torch", options={"enable_lora": True})
        if model == "exported":
            second, checkpoint = exported(2.7)
            generate = ["generate", {"prompts": beginnings, "tokens": TOKENS}]
            quantization = {"quantization": "gamma"}
            add("second torch", checkpoint, [generate], kernel="torch")
            environment = {"GAMMA_MANIFEST": str(exported(3.5)[0]), "GAMMA_VERIFY": "1"}
            bank = {"kernel": "torch", "options": quantization}
            steps = [generate, ["zero", {}], ["reload", {}], generate]
            add("bank by variable", learned / "bank", steps, environment=environment, **bank)
            overrides = {"options": quantization | {"hf_overrides": {"gamma_manifest": str(second)}}}
            environment = {"GAMMA_MANIFEST": ""}
            add("bank by override", learned / "bank", [generate], environment=environment, **(bank | overrides))
            add("bank without manifest", learned / "bank", [generate], environment=environment, **bank)
    results = run_engines(jobs, folder)

    def get(name):
        if name not in results:
            pytest.skip(lacking("model", f"trained model {name.split()[0]} is not at hand"))
        return succeeded(results[name])

    get.error = lambda name: results[name]["error"]
    get.logprobs = lambda name: torch.load(folder / f"{name}.pt")
    return get


def logit_error(given, expected):
    """Relative error of the logits, up to the constant of each row that a softmax does not see."""
    given, expected = (t - t.mean(-1, keepdim=True) for t in (given, expected))
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_those_of_transformers(answers, model):
    expected, _ = answers(f"{model} transformers")
    given, _ = answers(f"{model} torch")
    assert given == expected
    assert logit_error(answers.logprobs(f"{model} torch"), answers.logprobs(f"{model} transformers")) < 1e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kernel", EVERY_KERNEL[1:])
def test_kernels_agree_with_transformers(answers, model, kernel, record_property):
    _, expected = answers(f"{model} transformers")
    _, given = answers(f"{model} {kernel}")
    error = logit_error(answers.logprobs(f"{model} {kernel}"), answers.logprobs(f"{model} transformers"))
    record_property("relative logit error", error)
    record_property("perplexity", [given, expected])
    assert error < 1e-2
    assert given == pytest.approx(expected, rel=5e-3)


def test_bfloat16_activations(answers):
    _, expected = answers("demo transformers")
    _, given = answers("demo ark bfloat16")
    assert given == pytest.approx(expected, rel=2e-2)


@pytest.mark.skipif(COMPILER is None, reason=lacking("program", "g++, for torch.compile, is not here"))
@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_compiled_engine_answers_like_the_eager_one(answers, kernel):
    assert answers(f"babyllama105 {kernel} compiled")[0] == answers(f"babyllama105 {kernel}")[0]
    names = (f"babyllama105 {kernel} compiled", f"babyllama105 {kernel}")
    assert logit_error(*map(answers.logprobs, names)) < 1e-4


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_weights_can_be_reloaded(answers, kernel):
    before, parameters, _, without, _, after, reloaded = answers(f"demo {kernel} reload")
    assert without != before
    assert after == before
    assert reloaded == parameters


def test_a_worker_holds_the_bytes_that_were_planned(answers, checkpoints):
    """Of the layers of the plugin, in the live engine, against the closed formula."""
    parameters = answers("demo torch reload")[1]
    held = {
        name: torch.empty(0, dtype=getattr(torch, dtype.removeprefix("torch."))).element_size() * math.prod(shape)
        for name, (dtype, shape, _) in parameters.items()
    }
    config = json.loads((checkpoints("demo")[0] / "config.json").read_text())
    modules = CheckpointConfig.parse(config["quantization_config"]).modules
    planned = 0
    for name, module in modules.items():
        leaf = name.rpartition(".")[2]
        layer = name.replace(leaf, FUSED.get(leaf, leaf))
        if f"{layer}.weight_packed" in held:
            planned += resident_bytes(module, "replicated") * (1 if module.quantized else 2)  # the engine has float32
    assert sum(held.values()) == planned


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_an_engine_started_without_weights_runs_and_can_load_them(answers, kernel):
    tokens, _, parameters = answers(f"demo {kernel} dummy")
    assert [len(t) for t in tokens] == [TOKENS, TOKENS]
    assert parameters == answers(f"demo {kernel} reload")[1]


@needs_030
def test_the_bank_serves_any_manifest(answers):
    before, _, _, reloaded = answers("bank by variable")
    assert before == answers("exported torch")[0]
    assert reloaded == before
    assert answers("bank by override") == answers("second torch")
    assert answers("bank by override")[0] != before
    assert "is a bank: say which manifest to serve, by GAMMA_MANIFEST=" in answers.error("bank without manifest")


def test_lora_adapters_go_on_top(answers):
    base, changed = answers("demo lora")
    assert base == answers("demo ark")[0]
    assert changed != base


@needs_030
def test_channel_blocks_are_served_from_the_bank_and_reloaded(answers):
    before, parameters, _, without, _, after, reloaded = answers("cut bank, reloaded")
    assert before == answers("cut torch")[0]
    assert without != before
    assert after == before
    assert reloaded == parameters


def test_adapters_are_refused_where_channels_are_sorted(answers):
    assert "its channels are sorted, and LoRA adapters are for their original order" in answers.error("cut lora")


@needs_two_cores
@pytest.mark.parametrize("model", ["demo", "cut"])
def test_two_tensor_parallel_ranks_answer_like_one(answers, model):
    assert answers(f"{model} two ranks") == [answers(f"{model} ark")[0]]
