"""Models of several sizes of one family, built by transformers without memory: what their tensors are called and how
large they are.

The sizes that config.json gives differ from probe to probe and from each other, so that a size of a tensor tells which
of them it is made of.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import torch
from torch import nn

from allocator.blocks.skeleton import decoder_blocks

__all__ = ["BLOCKS", "PROBES", "Probe", "blocks_key", "config_class", "probe", "probe_of", "sizes_of"]

BLOCKS = 12
"""Enough for every kind of layer to occur, and the period of their pattern."""
PROBES = 4

_HEADS, _KV_HEADS = (12, 20, 42, 16), (3, 10, 7, 8)
_ROUTERS = ("n_group", "topk_group", "num_expert_group", "num_limited_groups")
_UNCHANGED = re.compile(
    r"(.*_token(_id|s)?|.*_index|num_hidden_layers|n_layer|.*_layers?|max_.*|.*_length|.*window.*|.*chunk.*|.*_pattern|.*_interval|"
    r".*_step|.*_freq|.*_replace|num_labels|num_global.*|.*per_tok(en)?|.*top_?k|.*_mod|.*multiple_of|transformers_version|n_predict|"
    r"pretraining_tp|.*_factor|expand|.*expand|.*_mult|.*world.*|.*_conv|interleave.*)"
)


@dataclass(frozen=True)
class Probe:
    """A model on the meta device. `stored` are shapes by the names that its checkpoint has; `linear` are the names of
    its linear modules, `in_order` the place of each module with weights; `layer_kinds` says of what kind each block is,
    if config tells. `interleaved`: its experts have the rows of gate and up in turns."""

    config: Any
    stored: dict[str, tuple[int, ...]]
    linear: frozenset[str]
    in_order: dict[str, int]
    block_prefix: str
    embedding: str
    head: str
    layer_kinds: list[str] | None
    interleaved: bool = False


def config_class(model_type: str) -> Any:
    """The config class of a text model of transformers; of a multimodal model, that of its language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return type(CONFIG_MAPPING[model_type]().get_text_config())


def blocks_key(kind: Any) -> str:
    """The key of config.json that counts blocks."""
    key: str = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return key


def sizes_of(kind: Any, more: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """The value of each size of a config class in each of the probes, and of those keys that it reads undeclared."""
    values: dict[str, tuple[int, ...]] = {}
    named = {key.name: str(key.type) for key in fields(kind)}
    own_names = {own: common for common, own in kind.attribute_map.items()}
    undeclared = dict.fromkeys(("head_dim", *more), "int")
    for name, of_type in (named | undeclared).items():
        if "int" not in of_type or any(other in of_type for other in ("float", "list", "dict")):
            continue
        if (_UNCHANGED.fullmatch(name) and name not in more) or name in _ROUTERS:
            continue
        role = own_names.get(name, name)
        if role == "num_attention_heads":
            values[name] = _HEADS
        elif role in ("mamba_n_heads", "mamba_num_heads"):
            values[name] = (24, 40, 28, 32)
        elif name == "mamba_d_ssm":  # heads * d_head
            values[name] = (24 * 88, 40 * 112, 28 * 64, 32 * 72)
        elif role in ("mamba_d_head", "mamba_head_dim") and "mamba_d_ssm" in named:
            values[name] = (88, 112, 64, 72)
        elif role in ("mamba_d_head", "mamba_head_dim") and "validate_architecture" in vars(kind):
            # Classes that ask for it: heads * d_head is twice the hidden size.
            values[name] = (22, 34, 30, 74)
        elif role == "hidden_size":
            values[name] = tuple(h * f for h, f in zip(_HEADS, (22, 34, 10, 74), strict=True))
        elif name == "num_global_key_value_heads":
            values[name] = (2, 5, 21, 4)
        elif name == "num_key_value_heads":
            values[name] = _KV_HEADS
        elif name.endswith("num_value_heads"):
            values[name] = (6, 20, 14, 24)
        elif name.endswith("num_key_heads"):
            values[name] = (3, 5, 7, 4)
        elif "expert" in name and not name.endswith("size"):
            values[name] = (5, 6, 4, 3) if "shared" not in name else (2, 3, 5, 4)
        elif "kernel" in name or name.endswith("L_cache"):
            values[name] = (4, 3, 5, 2)
        elif name in ("n_groups", "mamba_n_groups"):
            values[name] = (2, 5, 4, 8)
        else:
            # Other numbers for every name, so that no sum of some is that of others.
            drawn = Random(name)
            values[name] = tuple(8 * number for number in drawn.sample(range(11, 400), PROBES))
    return values


def probe(kind: Any, model_class: Any, values: Mapping[str, Any]) -> Probe:
    """The model of the config class `kind` with `values`. Raises whatever transformers does for values it refuses."""
    from transformers import AutoModelForCausalLM

    given = {
        blocks_key(kind): BLOCKS, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    known = {key.name for key in fields(kind)}
    config = kind(**({k: v for k, v in given.items() if k in known} | dict(values)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
    return probe_of(model, config)


def probe_of(model: Any, config: Any) -> Probe:
    """What the tensors of a model are called and how large they are."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict(keep_vars=True)
    stored = revert_weight_conversion(model, state)
    names = {id(tensor): name.removesuffix(".weight") for name, tensor in stored.items()}
    in_order = {name: place for place, name in enumerate(names[id(t)] for t in state.values() if id(t) in names)}
    _, blocks = decoder_blocks(model.get_decoder())
    first = next(name for name in (names.get(id(p)) for p in blocks[0].parameters()) if name is not None)
    match = re.match(r"(.*?)\.0\.", first)
    assert match is not None
    return Probe(
        config=config,
        stored={name: tuple(tensor.shape) for name, tensor in stored.items()},
        linear=frozenset(
            names[id(m.weight)] for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in names
        ),
        in_order=in_order,
        block_prefix=match[1],
        embedding=names[id(model.get_input_embeddings().weight)],
        head=names[id(model.get_output_embeddings().weight)],
        layer_kinds=_layer_kinds(config.get_text_config()),
        interleaved=any(not getattr(module, "is_concatenated", True) for module in model.modules()),
    )


def _layer_kinds(config: Any) -> list[str] | None:
    for key in ("layer_types", "layers_block_type"):
        kinds = getattr(config, key, None)
        if isinstance(kinds, list) and len(kinds) == config.num_hidden_layers:
            return list(kinds)
    return None
