"""A plan adds up, says what would make it fit, and is refused where vLLM would refuse to start."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.model import read_shape
from allocator.plan import Plan, PlannedWeights, PlanRequest, find_gpu, load_catalogue, make_plan, memory_device
from allocator.plan.plan import plans_of_catalogue
from allocator.plan.vllm_arguments import vllm_arguments
from tests.configs import PUBLISHED_PARAMETERS, config_of, shape_of

GIB = 2**30


def plan_of(name="qwen3-32b", gpu="rtx4090", **request):
    request = {"max_model_len": 16384, "max_num_seqs": 4, "kv_cache_dtype": "fp8"} | request
    return make_plan(shape_of(name), find_gpu(gpu), PlanRequest(**request), model=name)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_lines_add_up_to_what_vllm_may_use(name):
    plan = plan_of(name, "h100", max_model_len=2048)
    parts = sum(line.nbytes for line in plan.lines[3:-1])
    assert plan.weight_budget_bytes + parts == plan.line("vLLM may use").nbytes
    assert plan.weight_budget_bytes == plan.line("left for weights").nbytes
    assert plan.verdict.fits


def test_weights_at_16_bits_are_the_parameters_and_the_padding_of_the_vocabulary():
    for name in ("llama-3.1-8b", "qwen3-32b", "phi-4", "qwen3-30b-a3b", "gemma-3-27b"):
        shape = shape_of(name)
        padding = -shape.vocabulary % 64 * shape.hidden_size * (1 if shape.tied else 2)
        plan = plan_of(name, "h100", max_model_len=2048)
        assert plan.uniform[-1].nbytes == 2 * (shape.parameters + padding)


def test_what_is_needed_and_advised_is_exactly_enough():
    plan = plan_of(gpu="rtx4090", kv_cache_dtype="auto", max_num_seqs=8)
    assert not plan.verdict.fits
    assert plan.verdict.needs_bytes == plan.smallest_weight_bytes - plan.weight_budget_bytes
    options = {advice.option: advice.value for advice in plan.advice}
    assert plan.verdict.message.startswith(f"needs {plan.verdict.needs_bytes / GIB:.2f} GiB more: --max-model-len")
    length = int(options["--max-model-len"])
    assert plan_of(kv_cache_dtype="auto", max_num_seqs=8, max_model_len=length).verdict.fits
    assert not plan_of(kv_cache_dtype="auto", max_num_seqs=8, max_model_len=length + 256).verdict.fits
    sequences = int(options["--max-num-seqs"])
    assert plan_of(kv_cache_dtype="auto", max_num_seqs=sequences).verdict.fits
    assert not plan_of(kv_cache_dtype="auto", max_num_seqs=sequences + 1).verdict.fits


def test_where_no_option_is_enough_the_smallest_card_that_does_is_named():
    plan = plan_of(gpu="rtx4060")
    (advice,) = plan.advice
    assert advice.option == "--gpu"
    assert plan_of(gpu=advice.value).verdict.fits
    assert plan.verdict.message.endswith(f"GiB more: --gpu {advice.value} fits")


def test_checkpoint_that_fills_the_budget_leaves_the_cache_that_was_planned():
    shape = shape_of("qwen3-8b")
    formats = {}
    for kind in shape.modules:
        for block in kind.blocks or (0,):
            width = {"num_bits": 16} if kind.why_16 else {"num_bits": 4, "group_size": 128, "symmetric": False}
            formats[kind.name.replace("{i}", str(block))] = ModuleFormat(shape=kind.shape, **width)
    request = PlanRequest(max_model_len=8192, max_num_seqs=4)
    plan = make_plan(shape, find_gpu("rtx4090"), request, weights=PlannedWeights(formats=formats))
    four_bits = next(entry.nbytes for entry in plan.uniform if entry.num_bits == 4)
    assert plan.planned.weight_bytes <= four_bits  # neighbours packed together save padding
    spare = plan.weight_budget_bytes - plan.planned.weight_bytes
    assert plan.planned.kv_bytes == plan.line("KV cache").nbytes + spare
    assert plan.planned.sequences > 4
    formats.popitem()
    with pytest.raises(InputError, match="lm_head: the checkpoint has no entry; it belongs to another model"):
        make_plan(shape, find_gpu("rtx4090"), request, weights=PlannedWeights(formats=formats))


def test_probe_replaces_lines_and_is_named_as_their_basis():
    probe = {"activations": 123, "cuda graphs": 7}
    plan = make_plan(shape_of("qwen3-8b"), find_gpu("l4"), PlanRequest(max_model_len=4096), probe=probe)
    assert (plan.line("activations").nbytes, plan.line("activations").basis) == (123, "probe")
    with pytest.raises(InputError, match="weather"):
        make_plan(shape_of("qwen3-8b"), find_gpu("l4"), PlanRequest(max_model_len=4096), probe={"weather": 1})


@given(
    memory=st.integers(6 * GIB, 90 * GIB), length=st.integers(256, 16384), sequences=st.integers(1, 64),
    dtype=st.sampled_from(["auto", "fp8"]), ranks=st.sampled_from([1, 2, 4]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_more_traffic_never_leaves_more_for_the_weights(memory, length, sequences, dtype, ranks):
    def budget(**changes):
        request = {"max_model_len": length, "max_num_seqs": sequences, "kv_cache_dtype": dtype}
        request |= {"tensor_parallel_size": ranks} | changes
        return make_plan(shape_of("qwen3-14b"), memory_device(memory), PlanRequest(**request)).weight_budget_bytes

    assert budget(max_model_len=length + 512) <= budget()
    assert budget(max_num_seqs=sequences + 1) <= budget()
    assert budget(kv_cache_dtype="fp8") >= budget(kv_cache_dtype="auto")
    plan = make_plan(
        shape_of("qwen3-14b"), memory_device(memory),
        PlanRequest(max_model_len=length, max_num_seqs=sequences, kv_cache_dtype=dtype, tensor_parallel_size=ranks),
    )  # fmt: skip
    assert plan.planned is None or plan.planned.sequences >= sequences


def test_what_linear_attention_keeps_of_a_sequence_is_a_line_of_its_own():
    short, long = (plan_of("qwen3-next-80b-a3b", "b200", max_model_len=n) for n in (8192, 65536))
    state = short.line("recurrent state").nbytes
    assert long.line("recurrent state").nbytes == state == 4 * 3 * 2 * short.kv_bytes_per_block
    assert long.line("KV cache").nbytes > short.line("KV cache").nbytes
    more = plan_of("qwen3-next-80b-a3b", "b200", max_model_len=8192, max_num_seqs=8)
    assert more.line("recurrent state").nbytes == 2 * state
    assert "recurrent state" not in {line.name for line in plan_of().lines}


def test_no_more_sequences_are_asked_for_than_vllm_starts_with_where_each_keeps_a_state():
    def sequences(name):
        plan = plan_of(name, "b200", max_model_len=8192, max_num_seqs=1024, kv_sequences=1)
        return plan.request.max_num_seqs, plan.kv_blocks_per_sequence

    most, blocks = sequences("qwen3-next-80b-a3b")
    assert most == blocks + 1
    assert sequences("qwen3-32b")[0] == 1024


def test_ranks_share_weights_and_cache():
    one, two = plan_of("llama-3.1-70b", "h100"), plan_of("llama-3.1-70b", "h100", tensor_parallel_size=2)
    assert one.line("KV cache").nbytes == 2 * two.line("KV cache").nbytes
    assert two.uniform[2].nbytes == pytest.approx(one.uniform[2].nbytes / 2, rel=1e-3)
    stages = plan_of("llama-3.1-70b", "h100", pipeline_parallel_size=4)
    assert max(stages.uniform[2].nbytes * 4, one.uniform[2].nbytes) == stages.uniform[2].nbytes * 4


def test_experts_are_dealt_out_or_cut():
    cut = plan_of("qwen3-30b-a3b", "a100", tensor_parallel_size=2)
    dealt = plan_of("qwen3-30b-a3b", "a100", tensor_parallel_size=2, expert_parallel=True)
    assert dealt.uniform[-1].nbytes == cut.uniform[-1].nbytes


def test_model_that_groups_would_be_cut_in_is_refused_naming_the_module():
    with pytest.raises(InputError, match=r"experts.0.down_proj: tensor_parallel_size 4 gives each rank 192 of 768"):
        make_plan(shape_of("qwen3-30b-a3b"), find_gpu("l4"), PlanRequest(tensor_parallel_size=4, kernel="torch"))


def test_catalogue_is_planned_from_the_least_memory_up():
    plans = plans_of_catalogue(
        shape_of("qwen3-8b"), load_catalogue(), PlanRequest(max_model_len=8192, kv_cache_dtype="fp8")
    )
    assert [p.device.cuda_bytes for p in plans] == sorted(p.device.cuda_bytes for p in plans)
    names = [p.device.name for p in plans]
    assert "NVIDIA H100 80GB HBM3" in names
    assert "Tesla T4" not in names  # no kernels for an fp8 cache


def test_plan_is_a_document(tmp_path):
    plan = plan_of()
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


def test_command_line_says_all_that_the_plan_rests_on():
    words = vllm_arguments(plan_of(), "DIR")
    assert " ".join(words) == (
        "vllm serve DIR --max-model-len 16384 --max-num-seqs 4 --max-num-batched-tokens 2048 "
        "--gpu-memory-utilization 0.92 --kv-cache-dtype fp8"
    )
    turing = vllm_arguments(plan_of("qwen3-8b", "t4", kv_cache_dtype="auto", enforce_eager=True), "DIR")
    assert turing[-3:] == ["--enforce-eager", "--dtype", "float16"]


def test_context_of_the_model_is_the_default_and_the_limit():
    assert make_plan(shape_of("phi-4"), find_gpu("h100"), PlanRequest()).request.max_model_len == 16384
    with pytest.raises(InputError, match="--max-model-len 16385 is beyond the model's 16384"):
        make_plan(shape_of("phi-4"), find_gpu("h100"), PlanRequest(max_model_len=16385))


def test_config_without_rules_for_its_layers_is_refused():
    from allocator.model import read_shape

    with pytest.raises(InputError, match="hidden_size must be a positive integer, given -5"):
        read_shape(config_of("qwen3-8b") | {"hidden_size": -5})


def test_a_cache_that_is_not_known_is_refused_by_the_model_s_name():
    sparse = config_of("deepseek-v2-lite") | {"architectures": ["DeepseekV32ForCausalLM"], "index_head_dim": 128}
    sparse |= {"layer_types": ["indexed_attention"] * 27, "q_lora_rank": 1536}
    with pytest.raises(InputError, match="DeepseekV32ForCausalLM: the caches of some of its layers are not planned"):
        make_plan(read_shape(sparse), find_gpu("h200"), PlanRequest(max_model_len=4096))


def test_a_length_that_rope_scaling_does_not_reach_is_refused_with_what_would_make_it_reach():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    stretched = read_shape(config_of("qwen3-8b") | {"max_position_embeddings": 32768, "rope_scaling": yarn})
    told = r"beyond the model's 32768 .*set max_position_embeddings to 131072 in config\.json"
    with pytest.raises(InputError, match=told):
        make_plan(stretched, find_gpu("h100"), PlanRequest(max_model_len=131072))
    linear = read_shape(
        config_of("qwen3-8b") | {"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 4.0}}
    )
    assert make_plan(linear, find_gpu("h100"), PlanRequest()).request.max_model_len == 131072


@pytest.mark.parametrize(
    "wrong",
    [{"rope_scaling": "yarn"}, {"rope_scaling": {"type": "linear", "factor": "4"}}, {"max_position_embeddings": -1}],
)
def test_a_length_that_means_nothing_is_refused_by_its_key(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)) if "factor" not in str(wrong) else "factor"):
        read_shape(config_of("qwen3-8b") | wrong)
