"""The rules of each known architecture, from `architectures.json`: its tensors, and what vLLM makes of them.

A dimension is a sum of products and quotients of config keys, as in `num_key_value_heads*head_dim`; a key with
a dot stands in a part of the config (`vision_config.hidden_size`). A key that config.json leaves out takes its
value from `defaults`, which are those of the Hugging Face config class.
"""

import re
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import Field, TypeAdapter

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.contract.resident import Split

__all__ = [
    "Architecture",
    "ExpertKeys",
    "Linear",
    "NamedShape",
    "OtherTensor",
    "architecture_of",
    "known_architectures",
]

_OPERATION = re.compile(r"([*/]?)([a-z_.]+[0-9]?)")

Blocks = Literal["all", "dense", "sparse"]
"""In which blocks a tensor occurs: those without (dense) or with (sparse) experts."""


class NamedShape(Strict):
    """A module outside the blocks, and its weight's shape `[out_features, in_features]`.

    `why_16` says why no server can hold it below 16 bits; None if one can.
    """

    name: str
    shape: tuple[str, str]
    why_16: str | None = None


class Linear(Strict):
    """A module inside the blocks; `{e}` in its name is the number of an expert.

    `split` is how tensor parallelism cuts it, `fused` the vLLM layer it becomes a part of. It exists if the
    config key `when` has a value, and not if `unless` has one.
    """

    name: str
    shape: tuple[str, str]
    split: Split = "column"
    fused: str | None = None
    blocks: Blocks = "all"
    when: str | None = None
    unless: str | None = None


class OtherTensor(Strict):
    """A tensor copied bit for bit; it must be there if the config key `when` is true or not given.

    `{i}` in its name is the number of a block, `{v}` counts up to the config key `repeat`.
    """

    name: str
    shape: tuple[str, ...] = Field(min_length=1)
    split: Split = "replicated"
    blocks: Blocks = "all"
    repeat: str | None = None
    when: str | None = None


class ExpertKeys(Strict):
    """A mixture of experts: config keys of how many there are, how many a token takes, and their size.

    `blocks` says which blocks have them: `all`, or the config key that says it (`decoder_sparse_step`,
    `first_k_dense_replace`).
    """

    count: str
    per_token: str
    size: str
    blocks: Literal["all", "decoder_sparse_step", "first_k_dense_replace"]


class Architecture(Strict):
    """The rules of one architecture; `{i}` stands for the number of a block.

    `window` says which layers see a sliding window: none, every one (`sliding_window`), every one if
    `use_sliding_window` covers all, or by `layer_types` / `sliding_window_pattern` (`pattern`). `plan_only` says
    why the architecture can be planned and not learned. `text_config`: the language model's keys stand there.
    `length_is_stretched`: its max_position_embeddings count every RoPE scaling.
    """

    block: str = Field(pattern=r"\{i\}")
    block_count: str
    linears: list[Linear]
    embedding: NamedShape
    lm_head: NamedShape
    others: list[OtherTensor]
    defaults: dict[str, int | str]
    attention: Literal["grouped", "mla"] = "grouped"
    window: Literal["none", "every", "use_sliding_window", "pattern"] = "none"
    experts: ExpertKeys | None = None
    tied_by_default: bool = False
    text_config: bool = False
    length_is_stretched: bool = False
    plan_only: str | None = None

    def language(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of config.json that describes the language model."""
        if not self.text_config:
            return config
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise InputError(f"config.json: text_config must be an object, given {text!r:.40}")
        return {**text, **{key: value for key, value in config.items() if isinstance(value, dict)}}

    def dimension(self, expression: str, config: dict[str, Any]) -> int:
        """The value of an expression such as `num_key_value_heads*head_dim`; `config` is that of `language`.

        Raises InputError if a key is missing or no positive integer.
        """
        return sum(self._product(term, config) for term in expression.split("+"))

    def _product(self, expression: str, config: dict[str, Any]) -> int:
        value = 1
        for operator, key in _OPERATION.findall(expression):
            factor = self._config_value(key, config)
            if operator != "/":
                value *= factor
            elif value % factor:
                raise InputError(f"config.json: {expression} is {value}/{factor}, no whole number")
            else:
                value //= factor
        return value

    def shape(self, expressions: tuple[str, ...], config: dict[str, Any]) -> tuple[int, ...]:
        return tuple(self.dimension(expression, config) for expression in expressions)

    def has(self, key: str, config: dict[str, Any]) -> bool:
        """Whether the config key has a value that is not false."""
        value = config.get(key)
        if value is not None and not isinstance(value, bool | int):
            raise InputError(f"config.json: {key} must be true or false, given {value!r}")
        return bool(value)

    def is_sparse(self, block: int, config: dict[str, Any]) -> bool:
        """Whether block `block` has experts."""
        if self.experts is None:
            return False
        if self.experts.blocks == "all":
            return True
        if self.experts.blocks == "first_k_dense_replace":
            dense = config.get("first_k_dense_replace", 0)
            return bool(block >= dense and block % self._config_value("moe_layer_freq", config) == 0)
        if block in (config.get("mlp_only_layers") or ()):
            return False
        return (block + 1) % self._config_value("decoder_sparse_step", config) == 0

    def _config_value(self, key: str, config: dict[str, Any]) -> int:
        part, _, name = key.rpartition(".")
        given = config.get(part) if part else config
        value = given.get(name) if isinstance(given, dict) else None
        if value is None:
            default = self.defaults.get(key)
            if isinstance(default, str):
                return self.dimension(default, config)
            value = default
        if type(value) is not int or value < 1:
            found = given.get(name, "nothing") if isinstance(given, dict) else "nothing"
            raise InputError(f"config.json: {key} must be a positive integer, given {found!r}")
        return value


@cache
def _rules() -> dict[str, Architecture]:
    text = files("allocator.model").joinpath("architectures.json").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Architecture]).validate_json(text, strict=True)


def known_architectures() -> list[str]:
    return sorted(_rules())


def architecture_of(config: dict[str, Any]) -> tuple[str, Architecture]:
    """Name and rules of the architecture that config.json names. Raises InputError for an unknown one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(name, str) or name not in _rules():
        raise InputError(f"architecture {name!r} is not known; known are {', '.join(known_architectures())}")
    return name, _rules()[name]
