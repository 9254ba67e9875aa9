"""Which method each layer gets, and what is refused before anything is loaded."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat

DIGEST = "sha256:" + "0" * 64
EIGHT = ModuleFormat(shape=(64, 64), num_bits=8, group_size=64, symmetric=True)
SIXTEEN = ModuleFormat(shape=(64, 64), num_bits=16)


def test_importing_the_package_is_light():
    code = "import sys, gamma_vllm; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.fixture
def gamma():
    """`GammaConfig` of the given modules, with the names that vLLM fuses."""
    pytest.importorskip("vllm")
    from gamma_vllm.config import GammaConfig

    def make(modules):
        config = GammaConfig(
            CheckpointConfig(model_digest=DIGEST, manifest_digest=DIGEST, dtype="BF16", modules=modules)
        )
        config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
        return config

    return make


def of_type(name):
    """An object that is an instance of vLLM's layer class `name`, without making one."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    kinds = {c.__name__: c for c in (Attention, LinearBase, ParallelLMHead, RoutedExperts, VocabParallelEmbedding)}
    return kinds[name].__new__(kinds[name])


def test_registering_twice_is_harmless():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from gamma_vllm import register
    from gamma_vllm.config import GammaConfig

    register()
    register()
    assert QUANTIZATION_METHODS.count("gamma") == 1
    assert get_quantization_config("gamma") is GammaConfig


def test_layers_get_the_methods_of_their_modules(gamma):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from gamma_vllm.linear import GammaLinearMethod

    config = gamma({"a.q_proj": EIGHT, "a.k_proj": SIXTEEN, "a.v_proj": SIXTEEN, "a.o_proj": SIXTEEN})
    method = config.get_quant_method(of_type("LinearBase"), "a.qkv_proj")
    assert isinstance(method, GammaLinearMethod)
    assert [m.name for m in method.modules] == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert isinstance(config.get_quant_method(of_type("LinearBase"), "a.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(of_type("Attention"), "a.attn") is None
    draft = config.get_quant_method(of_type("LinearBase"), "draft_model.a.qkv_proj")
    assert [m.name for m in draft.modules] == ["a.q_proj", "a.k_proj", "a.v_proj"]


def test_a_layer_without_an_entry_is_refused(gamma):
    config = gamma({"a.q_proj": EIGHT, "a.v_proj": EIGHT})
    with pytest.raises(ContractError, match=r"layer a\.qkv_proj: .* no entry for a\.k_proj;"):
        config.get_quant_method(of_type("LinearBase"), "a.qkv_proj")
    with pytest.raises(ContractError, match=r"layer a\.1\.o_proj: .* no entry for a\.1\.o_proj;"):
        config.get_quant_method(of_type("LinearBase"), "a.1.o_proj")


def test_what_stands_beside_the_blocks_needs_no_entries(gamma):
    """As what makes Gemma 4's embeddings of each block."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    config = gamma({"model.embed_tokens": EIGHT, "model.layers.0.o_proj": EIGHT})
    beside = config.get_quant_method(of_type("LinearBase"), "model.per_layer_model_projection")
    assert isinstance(beside, UnquantizedLinearMethod)
    table = config.get_quant_method(of_type("VocabParallelEmbedding"), "model.embed_tokens_per_layer")
    assert isinstance(table, UnquantizedEmbeddingMethod)


def test_a_vision_tower_beside_the_language_model_needs_no_entries(gamma):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    config = gamma({"language_model.model.a.o_proj": EIGHT})
    tower = config.get_quant_method(of_type("LinearBase"), "vision_tower.layers.0.self_attn.qkv_proj")
    assert isinstance(tower, UnquantizedLinearMethod)
    with pytest.raises(ContractError, match=r"no entry for language_model\.model\.1\.o_proj"):
        config.get_quant_method(of_type("LinearBase"), "language_model.model.1.o_proj")


def experts_layer():
    layer = of_type("RoutedExperts")
    moe = SimpleNamespace(num_logical_experts=2)
    names = {"ckpt_gate_proj_name": "gate_proj", "ckpt_up_proj_name": "up_proj", "ckpt_down_proj_name": "down_proj"}
    layer.__dict__ |= {"moe_config": moe} | names
    return layer


def test_a_layer_that_vllm_names_after_another_parent_has_the_format_of_its_weights(gamma):
    """As vLLM calls `mamba` of Granite's hybrid models `mixer`, and leaves out `self_attn` of Falcon-H1's."""
    qkv = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    others = {"model.layers.1.mamba.in_proj": EIGHT, "model.layers.1.mlp.up_proj": SIXTEEN}
    config = gamma(dict.fromkeys(qkv, EIGHT) | others)
    method = config.get_quant_method(of_type("LinearBase"), "model.layers.1.mixer.in_proj")
    assert [module.name for module in method.modules] == ["model.layers.1.mamba.in_proj"]
    method = config.get_quant_method(of_type("LinearBase"), "model.layers.1.qkv_proj")
    assert [module.name for module in method.modules] == qkv
    with pytest.raises(ContractError, match=r"mixer\.out_proj: quantization_config has no entry"):
        config.get_quant_method(of_type("LinearBase"), "model.layers.1.mixer.out_proj")


def test_experts_get_a_method_that_knows_the_modules_of_each(gamma):
    modules = {f"a.experts.{i}.{n}_proj": SIXTEEN for i in range(2) for n in ("gate", "up", "down")}
    modules["a.experts.1.up_proj"] = EIGHT
    method = gamma(modules).get_quant_method(experts_layer(), "a.experts")
    assert [m.name for m in method.experts[1].w13] == ["a.experts.1.gate_proj", "a.experts.1.up_proj"]
    assert method.experts[0].w2.name == "a.experts.0.down_proj"
    del modules["a.experts.1.down_proj"]
    with pytest.raises(ContractError, match=r"no entry for a\.experts\.1\.down_proj"):
        gamma(modules).get_quant_method(experts_layer(), "a.experts")


def test_routers_need_no_entry(gamma):
    from vllm.model_executor.layers.fused_moe import GateLinear
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    method = gamma({"a.o_proj": EIGHT}).get_quant_method(GateLinear.__new__(GateLinear), "a.gate")
    assert isinstance(method, UnquantizedLinearMethod)


@pytest.mark.parametrize("prefix", ["model.embed_tokens", ""], ids=["named", "as Llama makes it"])
def test_an_embedding_gets_the_method_of_its_width(gamma, prefix):
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    layer = of_type("VocabParallelEmbedding")
    plain = gamma({"model.embed_tokens": SIXTEEN}).get_quant_method(layer, prefix)
    assert isinstance(plain, UnquantizedEmbeddingMethod)
    quantized = gamma({"model.embed_tokens": EIGHT}).get_quant_method(layer, prefix)
    assert (quantized.gathers, quantized.multiplies) == (True, False)
    with pytest.raises(ContractError, match=r"no entry for .*embed_tokens"):
        gamma({}).get_quant_method(layer, prefix)


def test_lm_head_needs_an_entry_unless_it_is_tied(gamma):
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    from gamma_vllm.embedding import TiedHeadMethod

    layer = of_type("ParallelLMHead")
    config = gamma({"model.embed_tokens": SIXTEEN})
    with pytest.raises(ContractError, match="no entry for lm_head"):
        config.get_quant_method(layer, "lm_head")
    tied = SimpleNamespace(get_text_config=lambda: SimpleNamespace(tie_word_embeddings=True))
    config.maybe_update_config("no/folder", tied)
    assert isinstance(config.get_quant_method(layer, "lm_head"), UnquantizedEmbeddingMethod)
    config = gamma({"model.embed_tokens": EIGHT})
    config.maybe_update_config("no/folder", tied)
    assert isinstance(config.get_quant_method(layer, "lm_head"), TiedHeadMethod)
    embedding = config.get_quant_method(of_type("VocabParallelEmbedding"), "model.embed_tokens")
    assert (embedding.gathers, embedding.multiplies) == (True, True)
    head = gamma({"lm_head": EIGHT}).get_quant_method(layer, "lm_head")
    assert (head.gathers, head.multiplies) == (False, True)


def test_modules_follow_the_renaming_of_the_model_class(gamma):
    from vllm.model_executor.models.utils import WeightsMapper

    config = gamma({f"model.a.{n}": EIGHT for n in ("q_proj", "k_proj", "v_proj")})
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    method = config.get_quant_method(of_type("LinearBase"), "language_model.model.a.qkv_proj")
    assert [m.name for m in method.modules] == ["model.a.q_proj", "model.a.k_proj", "model.a.v_proj"]
    with pytest.raises(ContractError, match="3 modules of the checkpoint have only 1 names"):
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_regex={re.compile(".*"): "x"}))


def test_a_model_without_declaration_is_refused(tmp_path):
    pytest.importorskip("vllm")
    from gamma_vllm.config import GammaConfig
    from tests.versions import IS_030

    message = r"no quantization_config and there is no bank\.json" if IS_030 else "needs vLLM 0.30"
    with pytest.raises(ContractError, match=message):
        GammaConfig().maybe_update_config(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, this release reads 1"),
        ({"comment": "hello"}, "comment: Extra inputs are not permitted"),
        ({"modules": {"a": EIGHT.model_dump(mode="json") | {"num_bits": 7}}}, r"modules\.a\.num_bits: .* 7"),
        ({"modules": {"a": EIGHT.model_dump(mode="json") | {"group_size": 48}}}, r"modules\.a\.group_size: .* 48"),
        ({"modules": {"a": {"shape": [64, 64], "num_bits": 4}}}, r"modules\.a: .*4-bit module needs group_size"),
    ],
)
def test_a_declaration_that_is_not_understood_is_refused(gamma, change, message):
    from gamma_vllm.config import GammaConfig

    good = gamma({"a": EIGHT}).checkpoint.model_dump(mode="json", exclude_none=True)
    assert GammaConfig.from_config(good).checkpoint == gamma({"a": EIGHT}).checkpoint
    with pytest.raises(ContractError, match=message):
        GammaConfig.from_config(json.loads(json.dumps(good | change)))
