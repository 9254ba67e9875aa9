"""The tables of sines and cosines that vLLM makes for rotary embeddings (`layers/rotary_embedding` of vLLM 0.32).

One table serves all layers that turn their heads alike: by the size of the head, the part of it that is turned, and
the parameters of the rotation. A layer kind has those of its own where config.json says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator.model.architectures import Architecture
from allocator.model.attention_layers import AttentionLayer
from allocator.model.context_length import rotations, table_rows

__all__ = ["COMPUTED_ANEW", "position_table_bytes"]

COMPUTED_ANEW = frozenset({
    "ArceeForCausalLM", "CwmForCausalLM", "FlexOlmoForCausalLM", "GlmForCausalLM", "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForCausalLM", "Jais2ForCausalLM", "MellumForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
    "OlmoForCausalLM", "PhiForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
})  # fmt: skip
"""Architectures that vLLM runs with the code of transformers, which computes sines and cosines at each step."""

_NOT_TURNED = ("NemotronHForCausalLM",)
_BY_WINDOW = ("Gemma3", "Gemma4")
"""Layers with windows have a rotation of their own, which config.json need not say."""
_IN_FLOAT32 = ("GptOssForCausalLM",)


@dataclass(frozen=True)
class _Turned:
    """Heads of `head_size` numbers of which `turned` are, by `parameters` (JSON), at `rows` positions."""

    head_size: int
    turned: int
    rows: int
    parameters: str


def position_table_bytes(
    architecture: str, rules: Architecture, language: dict[str, Any], attention: Sequence[AttentionLayer]
) -> int:
    """Bytes of all tables; `language` is the language model's part of config.json. Raises InputError naming a key whose
    value is not allowed."""
    if architecture in COMPUTED_ANEW or architecture in _NOT_TURNED:
        return 0
    if language.get("position_embedding_type") == "nope":
        return 0
    config = {**rules.defaults, **{key: value for key, value in language.items() if value is not None}}
    by_window = architecture.startswith(_BY_WINDOW)
    latent_size = rules.dimension("qk_rope_head_dim", language) if rules.attention == "mla" else None
    tables = set()
    for layer, kind in zip(attention, rules.kinds(len(attention), language), strict=True):
        if layer.kind in ("state", "nothing"):
            continue
        own = by_window and layer.window is not None
        parameters = rotations(config, kind or "full_attention", own)
        size = latent_size or layer.key_size or rules.dimension("head_dim", language)
        turned, rows = size if latent_size else _turned(size, parameters), table_rows(config, parameters)
        told = json.dumps(parameters | {"own": own}, sort_keys=True, default=str)
        tables.add(_Turned(size, turned, rows, told))
    number_bytes = 4 if architecture in _IN_FLOAT32 else 2
    return sum(number_bytes * table.rows * table.turned for table in tables)


def _turned(size: int, parameters: Mapping[str, Any]) -> int:
    own, part = parameters.get("rope_dim"), parameters.get("partial_rotary_factor")
    if parameters["rope_type"] == "proportional":  # Gemma 4's has zeros for what is not turned
        return size
    if type(own) is int:
        return own
    return int(size * part) if isinstance(part, int | float) and 0 < part <= 1 else size
