"""The rules of each known architecture, from `architectures.json`: its tensors, and how vLLM fuses them.

A dimension is a product or quotient of config keys, as in `num_key_value_heads*head_dim`. A key that
config.json leaves out takes its value from `defaults`, which are those of the Hugging Face config class.
"""

import re
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import Field, TypeAdapter, model_validator

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError

__all__ = ["Architecture", "NamedShape", "OtherTensor", "architecture_of", "known_architectures"]

_OPERATION = re.compile(r"([*/]?)([a-z_]+)")


class NamedShape(Strict):
    """A module outside the blocks, and its weight's shape `[out_features, in_features]`."""

    name: str
    shape: tuple[str, str]


class OtherTensor(Strict):
    """A tensor copied bit for bit; it must be there if the config key `when` is true or not given."""

    name: str
    shape: tuple[str, ...] = Field(min_length=1)
    when: str | None = None


class Architecture(Strict):
    """The rules of one architecture; `{i}` stands for the number of a block."""

    block: str = Field(pattern=r"\{i\}")
    block_count: str
    linears: dict[str, tuple[str, str]]
    fused_groups: dict[str, list[str]]
    embedding: NamedShape
    lm_head: NamedShape
    others: list[OtherTensor]
    defaults: dict[str, int | str]

    @model_validator(mode="after")
    def _groups_are_of_linears(self) -> "Architecture":
        members = [name for group in self.fused_groups.values() for name in group]
        if len(set(members)) != len(members) or not set(members) <= self.linears.keys():
            raise ValueError("each member of fused_groups must be one of linears, and in one group only")
        return self

    def fused_group_of(self, linear: str) -> str | None:
        """The vLLM layer that the linear `self_attn.q_proj` becomes a part of, or None."""
        return next((group for group, members in self.fused_groups.items() if linear in members), None)

    def dimension(self, expression: str, config: dict[str, Any]) -> int:
        """The value of an expression such as `num_key_value_heads*head_dim`.

        Raises InputError if a key is missing or no positive integer.
        """
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

    def _config_value(self, key: str, config: dict[str, Any]) -> int:
        value = config.get(key)
        if value is None:
            value = self.defaults.get(key)
            if isinstance(value, str):
                return self.dimension(value, config)
        if type(value) is not int or value < 1:
            raise InputError(f"config.json: {key} must be a positive integer, given {config.get(key, 'nothing')!r}")
        return value


@cache
def _rules() -> dict[str, Architecture]:
    text = files("allocator.inventory").joinpath("architectures.json").read_text(encoding="utf-8")
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
