"""What a model consists of, from config.json alone: every tensor with its shape, and its attention layers.

`read_inventory` checks the same description against the safetensors headers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

from allocator.contract.errors import InputError
from allocator.contract.expert_stacks import ExpertLayout
from allocator.contract.layout import PACK_UNIT, Dtype16
from allocator.contract.resident import Heads, Split
from allocator.model.architectures import Architecture, Linear, OtherTensor, architecture_of
from allocator.model.attention_layers import AttentionLayer, attention_layers
from allocator.model.context_length import ContextLength, context_length
from allocator.model.other_names import Head
from allocator.model.position_tables import position_table_bytes

__all__ = [
    "AttentionLayer",
    "ExpertCounts",
    "ModelShape",
    "ModuleKind",
    "OtherKind",
    "Role",
    "read_shape",
    "shape_of",
    "why_16",
]

Role = Literal["linear", "embedding", "lm_head"]


@dataclass(frozen=True)
class ModuleKind:
    """Modules of one name up to numbers: `model.layers.{i}.mlp.experts.{e}.up_proj` in `blocks`.

    Empty `blocks` mean one module outside the blocks; `experts` is 0 for one module a block. `shape` is
    `[out_features, in_features]`, `terms` how config.json gives it. `fused` is the name of the vLLM layer.
    """

    name: str
    shape: tuple[int, int]
    terms: tuple[str, str]
    role: Role
    split: Split
    fused: str | None
    blocks: tuple[int, ...]
    experts: int
    why_16: str | None

    @property
    def count(self) -> int:
        return (len(self.blocks) or 1) * (self.experts or 1)

    @property
    def parameters(self) -> int:
        """Of all modules of the kind."""
        return self.count * prod(self.shape)


@dataclass(frozen=True)
class OtherKind:
    """Tensors that are copied, of one name up to the number of a block `{i}` or a repetition `{v}`.

    `float32`: vLLM keeps them in that dtype.
    """

    name: str
    shape: tuple[int, ...]
    terms: tuple[str, ...]
    split: Split
    numbers: tuple[int, ...]
    float32: bool = False

    @property
    def count(self) -> int:
        return len(self.numbers) or 1

    @property
    def parameters(self) -> int:
        return self.count * prod(self.shape)

    def names(self) -> Iterator[str]:
        for number in self.numbers or (0,):
            yield self.name.replace("{i}", str(number)).replace("{v}", str(number))


@dataclass(frozen=True)
class ExpertCounts:
    """Experts of a sparse block, how many a token takes, and their intermediate size; `layout` is that of experts which
    are stored together."""

    count: int
    per_token: int
    size: int
    layout: ExpertLayout = "rows"


@dataclass(frozen=True)
class ModelShape:
    """A model as config.json describes it. `dtype` is that of its 16-bit weights in a checkpoint.

    `plan_only` says why it cannot be learned, None if it can. Tensors whose names begin with one of `beside` are copied
    too; not all of them are among `others`. `head` is what stands behind the last block. `position_bytes` are those of
    the tables of sines and cosines of rotary embeddings, which vLLM makes when it loads the model.
    """

    architecture: str
    config: dict[str, Any]
    dtype: Dtype16
    tied: bool
    blocks: int
    modules: tuple[ModuleKind, ...]
    others: tuple[OtherKind, ...]
    attention: tuple[AttentionLayer, ...]
    heads: Heads
    position_bytes: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    experts: ExpertCounts | None
    context: ContextLength
    plan_only: str | None
    beside: tuple[str, ...] = ()
    head: Head = "tokens"

    @cached_property
    def parameters(self) -> int:
        """All parameters; a tied lm_head counts once."""
        return sum(m.parameters for m in self.modules) + sum(o.parameters for o in self.others)

    @property
    def other_bytes(self) -> int:
        """Bytes of the tensors that are copied, at 16 bits."""
        return 2 * sum(o.parameters for o in self.others)


def read_shape(config: dict[str, Any]) -> ModelShape:
    """The description of the model that `config` (config.json) names.

    Raises InputError naming an unknown architecture, or the key that is missing or not allowed.
    """
    return shape_of(*architecture_of(config), config)


def shape_of(name: str, rules: Architecture, config: dict[str, Any]) -> ModelShape:
    """The description of the model `config` by the `rules` of the architecture `name`. Raises InputError."""
    language = rules.language(config)
    blocks = rules.blocks(language)
    sparse = [rules.is_sparse(i, language) for i in range(blocks)]
    places = _Places(sparse, rules.kinds(blocks, language), rules.shares_keys(blocks, language))
    tied = language.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is not None and not isinstance(tied, bool):
        raise InputError(f"config.json: tie_word_embeddings must be true or false, given {tied!r}")
    tied = (rules.tied_by_default if tied is None else tied) and rules.head == "tokens"

    modules = [_outside(rules, language, "embedding", tied)]
    modules += [kind for rule in rules.linears if (kind := _linear(rules, rule, language, places)) is not None]
    if rules.head == "tokens" and not tied:
        modules.append(_outside(rules, language, "lm_head"))
    others = [rest for other in rules.others if (rest := _other(rules, other, language, places)) is not None]
    experts = None
    if rules.experts is not None and any(sparse):
        count, per_token, size = (
            rules.dimension(key, language) for key in (rules.experts.count, rules.experts.per_token, rules.experts.size)
        )
        experts = ExpertCounts(count, per_token, size, rules.experts.layout)
    attention = attention_layers(name, rules, language, blocks)
    return ModelShape(
        architecture=name,
        config=config,
        dtype=_dtype16(config, language),
        tied=tied,
        blocks=blocks,
        modules=tuple(modules),
        others=tuple(others),
        attention=attention,
        heads=Heads(
            query=rules.dimension("num_attention_heads", language),
            key_value=rules.dimension("num_key_value_heads", language),
            size=rules.dimension("qk_head_dim" if rules.attention == "mla" else "head_dim", language),
        ),
        position_bytes=position_table_bytes(name, rules, language, attention),
        hidden_size=rules.dimension("hidden_size", language),
        intermediate_size=rules.dimension("intermediate_size", language),
        vocabulary=rules.dimension("vocab_size", language),
        experts=experts,
        context=context_length(language, rules.defaults, rules.length_is_stretched),
        plan_only=rules.why_planned_only(language),
        beside=tuple(rules.beside),
        head=rules.head,
    )


def why_16(in_features: int) -> str | None:
    """Why a module can only be stored at 16 bits, or None."""
    if in_features % PACK_UNIT:
        return f"in_features {in_features} is no multiple of {PACK_UNIT}"
    return None


def _outside(
    rules: Architecture, config: dict[str, Any], role: Literal["embedding", "lm_head"], tied: bool = False
) -> ModuleKind:
    named = rules.embedding if role == "embedding" else rules.lm_head
    shape = (rules.dimension(named.shape[0], config), rules.dimension(named.shape[1], config))
    split: Split = "head" if role == "lm_head" else "tied" if tied else "embedding"
    reason = named.why_16 or why_16(shape[1])
    return ModuleKind(named.name, shape, named.shape, role, split, None, (), 0, reason)


@dataclass(frozen=True)
class _Places:
    """Of each block, whether it has experts, its kind, and whether it shares keys of another."""

    sparse: list[bool]
    kinds: list[str | None]
    shared: list[bool]

    def of(self, rule: Linear | OtherTensor) -> tuple[int, ...]:
        """The blocks that have the tensor of `rule`."""
        return tuple(
            i
            for i, (is_sparse, kind, shares) in enumerate(zip(self.sparse, self.kinds, self.shared, strict=True))
            if (rule.blocks == "all" or is_sparse == (rule.blocks == "sparse"))
            and (rule.kinds is None or kind in rule.kinds)
            and (rule.keys is None or shares == (rule.keys == "shared"))
        )


def _linear(rules: Architecture, rule: Linear, config: dict[str, Any], places: _Places) -> ModuleKind | None:
    if rule.when is not None and not rules.has(rule.when, config):
        return None
    if rule.unless is not None and rules.has(rule.unless, config):
        return None
    blocks = places.of(rule)
    if not blocks:
        return None
    shape = (rules.dimension(rule.shape[0], config), rules.dimension(rule.shape[1], config))
    experts = 0
    if "{e}" in rule.name:
        assert rules.experts is not None
        experts = rules.dimension(rules.experts.count, config)
    prefix = rules.block + "."
    fused = None if rule.fused is None else prefix + rule.fused
    reason = rule.why_16 or why_16(shape[1])
    return ModuleKind(prefix + rule.name, shape, rule.shape, "linear", rule.split, fused, blocks, experts, reason)


def _other(rules: Architecture, other: OtherTensor, config: dict[str, Any], places: _Places) -> OtherKind | None:
    if other.when is not None and not rules.has(other.when, config):
        return None
    if other.unless is not None and rules.has(other.unless, config):
        return None
    numbers: tuple[int, ...] = ()
    if "{i}" in other.name:
        numbers = places.of(other)
        if not numbers:
            return None
    elif other.repeat is not None:
        numbers = tuple(range(rules.dimension(other.repeat, config)))
    return OtherKind(other.name, rules.shape(other.shape, config), other.shape, other.split, numbers, other.float32)


def _dtype16(config: dict[str, Any], language: dict[str, Any]) -> Dtype16:
    for key in ("dtype", "torch_dtype"):
        for part in (language, config):
            if part.get(key) == "float16":
                return "F16"
            if isinstance(part.get(key), str):
                return "BF16"
    return "BF16"
