"""A model is described from config.json alone, to the parameter."""

import json

import pytest

from allocator.contract.errors import InputError
from allocator.model import read_inventory, read_shape
from tests.configs import COUNTED_PARAMETERS, PUBLISHED_PARAMETERS, config_of, shape_of


@pytest.mark.parametrize("name", COUNTED_PARAMETERS)
def test_parameters_are_those_that_the_publisher_counts(name):
    assert shape_of(name).parameters == COUNTED_PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED_PARAMETERS)
def test_parameters_are_those_of_the_model_class_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = [tensor for key, tensor in model.state_dict().items() if key not in parameters]
    counted = sum(tensor.numel() for tensor in [*model.parameters(), *stored])
    assert shape_of(name).parameters == counted


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_config_alone_gives_what_the_files_hold(tiny_model, kind):
    inventory = read_inventory(tiny_model(kind))
    shape = inventory.shape
    names = {m.name for m in inventory.modules}
    assert len(names) == sum(k.count for k in shape.modules)
    assert sum(m.parameters for m in inventory.modules) == sum(k.parameters for k in shape.modules)
    assert inventory.other_bytes == shape.other_bytes


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_what_stands_outside_the_blocks_can_be_quantized_unless_vllm_cannot(name):
    outside = {kind.name: kind.why_16 for kind in shape_of(name).modules if not kind.blocks}
    assert len(outside) == (1 if shape_of(name).tied else 2)
    fixed = {kind: why for kind, why in outside.items() if why is not None}
    if name in ("mixtral-8x7b", "gpt-oss-20b", "lfm2-1.2b"):
        assert "model.embed_tokens" in fixed
        assert all(why.startswith("vLLM builds this") for why in fixed.values())
    else:
        assert not fixed


def test_experts_are_modules_of_their_own_and_the_router_is_copied():
    shape = shape_of("qwen3-30b-a3b")
    (up,) = [kind for kind in shape.modules if kind.name.endswith("up_proj")]
    assert up.name == "model.layers.{i}.mlp.experts.{e}.up_proj"
    assert up.fused == "model.layers.{i}.mlp.experts.w13"
    assert up.count == 48 * 128
    assert "model.layers.{i}.mlp.gate.weight" in {other.name for other in shape.others}


def test_dense_and_sparse_blocks_of_one_model_differ():
    shape = shape_of("deepseek-v2-lite")
    by_name = {kind.name.removeprefix("model.layers.{i}."): kind for kind in shape.modules}
    assert by_name["mlp.up_proj"].blocks == (0,)
    assert by_name["mlp.experts.{e}.up_proj"].blocks == tuple(range(1, 27))
    assert by_name["mlp.shared_experts.up_proj"].shape == (2816, 2048)
    assert "self_attn.q_a_proj" not in by_name


def test_gemma_3_alternates_windows_and_ties_its_head():
    shape = shape_of("gemma-3-27b")
    windows = [layer.window for layer in shape.attention]
    assert windows[:7] == [1024] * 5 + [None, 1024]
    assert windows.count(None) == 10
    assert shape.tied


def test_modules_fused_on_disk_are_one_module_of_one_width():
    qkv = next(kind for kind in shape_of("phi-4").modules if kind.name.endswith("qkv_proj"))
    assert (qkv.shape, qkv.fused, qkv.split) == ((5120 + 2 * 1280, 5120), None, "qkv")


WINDOWS = {
    "Mistral without the key": ("MistralForCausalLM", {}, {4096}),
    "Mistral with null": ("MistralForCausalLM", {"sliding_window": None}, {None}),
    "Qwen that has a window and does not use it": (
        "Qwen3ForCausalLM", {"sliding_window": 512, "use_sliding_window": False}, {None},
    ),
    "Qwen that uses it in some layers, which vLLM computes in full": (
        "Qwen2ForCausalLM", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 1}, {None},
    ),
    "Qwen that uses it everywhere": (
        "Qwen2ForCausalLM", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}, {512},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_window_is_the_one_that_vllm_sees(case):
    architecture, keys, expected = WINDOWS[case]
    config = config_of("qwen3-8b")
    del config["sliding_window"], config["use_sliding_window"], config["max_window_layers"]
    shape = read_shape(config | {"architectures": [architecture]} | keys)
    assert {layer.window for layer in shape.attention} == expected


def test_architecture_without_rules_is_refused_by_name():
    with pytest.raises(InputError, match=r"'MambaForCausalLM' is not known: .*; docs/models\.md lists"):
        read_shape(config_of("qwen3-8b") | {"architectures": ["MambaForCausalLM"]})


def test_architecture_that_can_only_be_planned_is_refused_for_learning_by_name(make_model):
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["PhiForCausalLM"]}))
    with pytest.raises(InputError, match=r"PhiForCausalLM can be planned .*only: its lm_head has a bias"):
        read_inventory(folder)
