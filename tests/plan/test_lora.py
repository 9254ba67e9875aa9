"""Adapters take their bytes from the weights; tests/e2e/test_lora_bytes.py counts the buffers of live workers."""

import pytest

from allocator.cli.main import main
from allocator.contract.errors import InputError
from allocator.plan import PlanRequest, find_gpu, make_plan
from allocator.plan.lora import lora_bytes
from allocator.plan.plan import plans_of_catalogue
from allocator.plan.schema import LoraRequest
from allocator.plan.vllm_arguments import vllm_arguments
from tests.configs import FOLDER, shape_of


def plan_of(name="llama-3.1-8b", gpu="l4", lora=None, **request):
    request = {"max_model_len": 8192, "max_num_seqs": 4} | request
    return make_plan(shape_of(name), find_gpu(gpu), PlanRequest(lora=lora, **request), model=name)


def test_buffers_come_off_what_is_left_for_weights():
    lora = LoraRequest(max_loras=4, max_lora_rank=64)
    without, plan = plan_of(), plan_of(lora=lora)
    adapters = plan.line("LoRA adapters")
    assert adapters.basis == "exact"
    assert without.weight_budget_bytes - plan.weight_budget_bytes >= adapters.nbytes
    with pytest.raises(KeyError):
        without.line("LoRA adapters")
    assert plan_of(lora=LoraRequest(max_loras=8, max_lora_rank=64)).line("LoRA adapters").nbytes == 2 * adapters.nbytes
    words = vllm_arguments(plan, "x")
    assert words[words.index("--enable-lora") :][:5] == ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "64"]


def test_ranks_share_half_of_each_pair():
    """Llama-3.1-8B counted by hand."""
    hidden, wide, kv, vocabulary = 4096, 14336, 1024, 128256
    for size in (1, 2, 4):
        columns = 3 * hidden + (hidden + 2 * kv) // size + 2 * hidden + 2 * wide // size
        rows = hidden // size + hidden + wide // size + hidden
        numbers = 32 * (columns + rows) + 2 * (hidden + vocabulary)
        request = PlanRequest(tensor_parallel_size=size, lora=LoraRequest(max_lora_rank=8))
        assert lora_bytes(shape_of("llama-3.1-8b"), request) == 2 * 8 * numbers


def test_naming_one_module_of_a_fused_layer_means_the_layer():
    def counted(*modules):
        lora = LoraRequest(target_modules=list(modules))
        return lora_bytes(shape_of("llama-3.1-8b"), PlanRequest(lora=lora))

    assert counted("q_proj") == counted("qkv_proj") == counted("q_proj", "v_proj")
    assert counted("qkv_proj", "o_proj") == counted("qkv_proj") + counted("o_proj")


@pytest.mark.parametrize(
    ("name", "lora", "words"),
    [
        ("qwen3-30b-a3b", LoraRequest(), "experts takes no adapters"),
        ("deepseek-v2-lite", LoraRequest(), "are not planned yet"),
        ("llama-3.1-8b", LoraRequest(target_modules=["query"]), "'query' is no module of the model"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(name, lora, words):
    with pytest.raises(InputError, match=words):
        plan_of(name, lora=lora)
    with pytest.raises(InputError, match=words):  # and not as if no card were large enough
        plans_of_catalogue(shape_of(name), [], PlanRequest(max_model_len=4096, lora=lora))


def test_models_with_experts_take_adapters_beside_them():
    plan = plan_of("qwen3-30b-a3b", "l40s", lora=LoraRequest(target_modules=["qkv_proj", "o_proj"]))
    assert plan.line("LoRA adapters").nbytes > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--enable-lora", "--max-lora-rank", "48"], "allowed are 1, 8, 16"),
        (["--enable-lora", "--max-loras", "0"], "give at least 1"),
        (["--enable-lora", "--lora-target-modules", ","], "--lora-target-modules is empty"),
        (["--max-loras", "2"], "--max-loras needs --enable-lora"),
    ],
)
def test_options_that_vllm_does_not_have_are_refused(options, words, capsys):
    assert main(["plan", str(FOLDER / "llama-3.1-8b.json"), "--gpu", "l4", *options]) == 2
    assert words in capsys.readouterr().err


def test_plan_prints_the_line(capsys):
    options = ["--gpu", "l4", "--max-model-len", "8192", "--enable-lora", "--max-loras", "4", "--max-lora-rank", "64"]
    assert main(["plan", str(FOLDER / "llama-3.1-8b.json"), *options]) == 0
    assert "LoRA adapters" in capsys.readouterr().out
