"""Of what kind each block is, and how large, in the forms that configs of several years say it in."""

from typing import Any

import pytest

from allocator.contract.errors import InputError
from allocator.model import read_shape

LFM2 = {
    "architectures": ["Lfm2ForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 16, "vocab_size": 65536, "block_ff_dim": 12288, "block_multiple_of": 256, "conv_L_cache": 3,
    "block_auto_adjust_ff_dim": True, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "max_position_embeddings": 128000,
}  # fmt: skip
NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"], "hidden_size": 2688, "num_attention_heads": 32, "head_dim": 128,
    "num_key_value_heads": 2, "vocab_size": 131072, "intermediate_size": 1856, "mamba_num_heads": 64,
    "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA_4 = {
    "architectures": ["Gemma4ForCausalLM"], "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "attention_k_eq_v": True, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 1000,
    "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def blocks_of(config: dict[str, Any], module: str) -> tuple[int, ...]:
    return next(kind.blocks for kind in read_shape(config).modules if kind.name.endswith(f".{{i}}.{module}"))


def test_a_model_of_convolutions_has_the_size_that_its_publisher_counts() -> None:
    """LFM2-1.2B: its feed-forward size is two thirds of what config.json says, rounded up."""
    assert read_shape(LFM2).parameters == 1_170_340_608
    assert blocks_of(LFM2, "self_attn.q_proj") == (2, 5, 8, 10, 12, 14)
    listed = {key: value for key, value in LFM2.items() if key != "full_attn_idxs"}
    kinds = ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]
    assert read_shape(listed | {"layer_types": kinds}).parameters == 1_170_340_608


def test_kinds_are_read_from_letters_and_from_names_old_and_new() -> None:
    by_letters = NEMOTRON_H | {"hybrid_override_pattern": "ME*-"}
    old = NEMOTRON_H | {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}
    new = NEMOTRON_H | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
    for config in (by_letters, old, new):
        places = [
            blocks_of(config, f"mixer.{name}") for name in ("in_proj", "experts.{e}.up_proj", "q_proj", "up_proj")
        ]
        assert places == [(0,), (1,), (2,), (3,)]
    assert read_shape(by_letters).parameters == read_shape(new).parameters


def test_experts_of_a_latent_size_are_smaller() -> None:
    config = NEMOTRON_H | {"hybrid_override_pattern": "E"}
    up = {kind.name.rpartition("experts")[2]: kind.shape for kind in read_shape(config).modules}[".{e}.up_proj"]
    assert up == (1856, 2688)
    latent = read_shape(config | {"moe_latent_size": 1024})
    assert {kind.shape for kind in latent.modules if kind.name.endswith("{e}.up_proj")} == {(1856, 1024)}


def test_heads_of_full_attention_are_read_from_configs_old_and_new() -> None:
    """Gemma 4: the keys of its blocks of full attention are the values too."""
    published = GEMMA_4 | {"global_head_dim": 512, "num_global_key_value_heads": 2}
    saved = GEMMA_4 | {"per_layer_config": {"1": {"head_dim": 512, "num_key_value_heads": 2}}}
    for config in (published, saved):
        found = {(k.name.rpartition(".")[2], k.blocks): (k.shape[0], k.split) for k in read_shape(config).modules}
        assert found["q_proj", (0,)] == (8 * 256, "column")
        assert found["q_proj", (1,)] == (8 * 512, "column")
        assert found["k_proj", (0,)] == (4 * 256, "kv")
        assert found["k_proj", (1,)] == (2 * 512, "key_value")
        assert ("v_proj", (1,)) not in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers must be below 2, given 2"),
        ({"per_layer_config": {"0": {"head_dim": 512}}}, "per_layer_config must say the same of all blocks"),
    ],
)
def test_what_blocks_run_one_by_one_cannot_have_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_shape(GEMMA_4 | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hybrid_override_pattern": "MX"}, "hybrid_override_pattern must consist of"),
        ({"hybrid_override_pattern": "M", "num_hidden_layers": 2}, "must name the kinds of 2 blocks, given 1"),
        ({"layers_block_type": 3}, "layers_block_type must be a list of names"),
    ],
)
def test_kinds_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_shape(NEMOTRON_H | change)


def test_a_feed_forward_size_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="intermediate_size must be a positive integer"):
        read_shape({key: value for key, value in LFM2.items() if key != "block_ff_dim"})
