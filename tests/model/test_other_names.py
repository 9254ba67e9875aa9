"""Architectures that are one of the table under another name: renamed, a classifier, or an embedding model."""

from importlib.util import find_spec

import pytest

from allocator.contract.errors import InputError
from allocator.model import read_inventory, read_shape
from allocator.model.architectures import known_architectures
from allocator.model.other_names import RENAMED
from allocator.model.position_tables import COMPUTED_ANEW
from tests.skips import lacking

HEAD = "lm_head.weight"


def _without_lm_head(_config, tensors):
    del tensors[HEAD]


def _embedding_model(make_model, **changes):
    folder = make_model("Qwen3ForCausalLM", spoil=_without_lm_head, **changes)
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def _classifier(make_model, labels=3, **changes):
    import torch

    def spoil(config, tensors):
        tensors["score.weight"] = torch.zeros(labels, config["hidden_size"], dtype=torch.bfloat16)
        tensors.pop(HEAD, None)
        config["architectures"] = ["Qwen3ForSequenceClassification"]

    return make_model("Qwen3ForCausalLM", spoil=spoil, id2label={str(i): f"L{i}" for i in range(3)}, **changes)


@pytest.mark.skipif(find_spec("vllm") is None, reason=lacking("package", "vllm is not installed"))
def test_vllm_has_the_same_class_for_both_names():
    from allocator.blocks.discovery.vllm_source import served_architectures

    served = served_architectures()
    for name, other in RENAMED.items():
        assert other.of in known_architectures()
        assert served[name] == served[other.of]


@pytest.mark.skipif(find_spec("vllm") is None, reason=lacking("package", "vllm is not installed"))
def test_tables_of_positions_are_not_counted_where_vllm_runs_the_code_of_transformers():
    from allocator.blocks.discovery.vllm_source import served_architectures

    served = served_architectures()
    assert {name for name in known_architectures() if served[name][0] == "transformers"} == COMPUTED_ANEW


def test_a_renamed_model_is_the_one_that_it_is(make_model):
    ours, theirs = (
        read_inventory(make_model("LlamaForCausalLM", architectures=[name], model_type=kind))
        for name, kind in (("InternLM3ForCausalLM", "internlm3"), ("LlamaForCausalLM", "llama"))
    )
    assert ours.architecture == "InternLM3ForCausalLM"
    assert ours.shape.modules == theirs.shape.modules
    assert not ours.unknown
    with pytest.raises(
        InputError, match="InternLM3ForCausalLM with qkv_bias cannot be learned: its biases are not those of Llama"
    ):
        read_inventory(make_model("LlamaForCausalLM", architectures=["InternLM3ForCausalLM"], qkv_bias=True))


def test_transformers_opens_a_renamed_model(make_model):
    pytest.importorskip("transformers")
    from allocator.blocks.hf_model import open_config

    folder = make_model("LlamaForCausalLM", architectures=["TeleChat3ForCausalLM"], model_type="telechat3")
    assert type(open_config(folder)).__name__ == "LlamaConfig"


def test_a_classifier_has_scores_in_the_place_of_an_lm_head(make_model):
    inventory = read_inventory(_classifier(make_model))
    assert {m.role for m in inventory.modules} == {"embedding", "linear"}
    assert "score.weight" in {t.name for t in inventory.others}
    assert inventory.shape.parameters == inventory.parameters + inventory.other_bytes // 2
    with pytest.raises(InputError, match=r"score\.weight has shape \[2, 64\], config\.json says \[3, 64\]"):
        read_inventory(_classifier(make_model, labels=2))


def test_the_embedding_of_a_tied_classifier_gives_no_logits(make_model):
    inventory = read_inventory(_classifier(make_model, tie_word_embeddings=True))
    assert [m.split for m in inventory.modules if m.role == "embedding"] == ["embedding"]


def test_an_embedding_model_needs_no_lm_head_whatever_its_config_says(make_model):
    inventory = read_inventory(_embedding_model(make_model))
    assert inventory.config["architectures"] == ["Qwen3Model"]
    assert {m.role for m in inventory.modules} == {"embedding", "linear"}
    assert read_shape(inventory.config).parameters == inventory.shape.parameters
    with pytest.raises(InputError, match=r"lm_head\.weight .* is missing"):
        read_inventory(make_model("Qwen3ForCausalLM", spoil=_without_lm_head))


def test_blocks_that_look_ahead_are_refused(make_model):
    with pytest.raises(InputError, match="is_causal is False: each token of this Qwen3Model sees those behind it"):
        read_inventory(_embedding_model(make_model, is_causal=False))
