"""The rules of each known architecture: its tensors, and what vLLM makes of them.

`architectures.json` is made by `make architectures` from transformers and vLLM (see `allocator.blocks.discovery`).
`architectures_by_hand.json` has what these do not tell, `towers.json` the tensors beside some language models (a vision
tower and its projector), as transformers has them and vLLM cuts them.

A dimension is a sum of products and quotients of config keys, as in `num_key_value_heads*head_dim`; a key with
a dot stands in a part of the config (`vision_config.hidden_size`). A key that config.json leaves out takes its
value from `defaults`, which are those of the Hugging Face config class.
"""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import Field

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.contract.expert_stacks import ExpertLayout
from allocator.contract.resident import Split
from allocator.model.derived_sizes import DERIVED
from allocator.model.found_here import read_found
from allocator.model.other_names import SCORE_NAME, Head, known_as, refuse_another_model

__all__ = [
    "Architecture",
    "ExpertKeys",
    "ExpertLayout",
    "Linear",
    "NamedShape",
    "OtherTensor",
    "architecture_of",
    "architecture_rules",
    "known_architectures",
    "table",
]

_OPERATION = re.compile(r"([*/]?)([A-Za-z0-9_.]+)")
_OLD_KINDS = {"attention": "full_attention", "mamba": "linear_attention"}
"""Kinds of blocks in configs that were written before transformers 5, and what they are called now."""

_OF_THE_PROJECTOR = ("spatial_merge_size",)
"""Keys that stand neither with the language model nor with the tower."""

Blocks = Literal["all", "dense", "sparse"]
"""In which blocks a tensor occurs: those without (dense) or with (sparse) experts."""

Keys = Literal["own", "shared"]
"""Whether a block makes its keys and values or attends to those of an earlier one, as the last ones of a model do whose
config says how many (`num_kv_shared_layers`)."""


class NamedShape(Strict):
    """A module outside the blocks, and its weight's shape `[out_features, in_features]`.

    `why_16` says why no server can hold it below 16 bits; None if one can.
    """

    name: str
    shape: tuple[str, str]
    why_16: str | None = None


class Linear(Strict):
    """A module inside the blocks; `{e}` in its name is the number of an expert.

    `split` is how tensor parallelism cuts it, `fused` the vLLM layer it becomes a part of. It exists in `blocks` of
    one of the `kinds` (None: of any) with `keys` of their own or shared (None: both), if the config key `when` has a
    value, and not if `unless` has one. `why_16` says why no server can hold it below 16 bits.
    """

    name: str
    shape: tuple[str, str]
    split: Split = "column"
    fused: str | None = None
    blocks: Blocks = "all"
    kinds: list[str] | None = None
    keys: Keys | None = None
    when: str | None = None
    unless: str | None = None
    why_16: str | None = None


class OtherTensor(Strict):
    """A tensor copied bit for bit; it must be there if the config key `when` is true or not given, unless `unless` is.

    `float32`: vLLM keeps it in that dtype.

    `{i}` in its name is the number of a block, `{v}` counts up to the config key `repeat`.
    """

    name: str
    shape: tuple[str, ...]
    split: Split = "replicated"
    blocks: Blocks = "all"
    kinds: list[str] | None = None
    keys: Keys | None = None
    repeat: str | None = None
    when: str | None = None
    unless: str | None = None
    float32: bool = False


class LayerKinds(Strict):
    """Of what kind each block is: a list under the config key `key`; where config.json has none, every `period`-th is
    of the kind `nth`, and the others of the kind `rest`. The config key `period_key` can say another period.

    Older configs say it in a string of `letters` under `letters_key`, or list the blocks of the kind `nth` under
    `numbers_key`.
    """

    key: str
    letters_key: str | None = None
    letters: dict[str, str] | None = None
    numbers_key: str | None = None
    period: int | None = None
    period_key: str | None = None
    nth: str | None = None
    rest: str | None = None


class ExpertKeys(Strict):
    """A mixture of experts: config keys of how many there are, how many a token takes, and their size. `layout` is that
    of experts which are stored together.

    `blocks` says which blocks have them: `all`, those of the kind `kind`, or the config key that says it
    (`decoder_sparse_step`, `interleave_moe_layer_step`, `first_k_dense_replace`). If `when` is given, only models that
    have that config key, which may be `count`.
    """

    count: str
    per_token: str
    size: str
    blocks: Literal["all", "kind", "decoder_sparse_step", "interleave_moe_layer_step", "first_k_dense_replace"]
    kind: str | None = None
    when: str | None = None
    layout: ExpertLayout = "rows"


class Architecture(Strict):
    """The rules of one architecture; `{i}` stands for the number of a block.

    `window` says which layers see a sliding window: none, every one (`sliding_window`), every one if
    `use_sliding_window` covers all, or those of the kind `sliding_attention` (`pattern`). `plan_only` says
    why the architecture can be planned and not learned, if the config key `plan_only_when` has a value or there is no
    such key. `text_config`: the language model's keys stand there, and
    names of what is copied beside it begin with one of `beside`; its size is known from files only, if not in `others`.
    `length_is_stretched`: its max_position_embeddings count every RoPE scaling. `of_full_attention`: config keys
    whose values are, in configs that list what differs by block (`per_layer_config`), those of other keys in the blocks
    of full attention.

    `head`: what stands behind the last block.
    """

    block: str = Field(pattern=r"\{i\}")
    block_count: str
    linears: list[Linear]
    embedding: NamedShape
    lm_head: NamedShape
    others: list[OtherTensor]
    defaults: dict[str, bool | int | str]
    layer_kinds: LayerKinds | None = None
    attention: Literal["grouped", "mla"] = "grouped"
    window: Literal["none", "every", "use_sliding_window", "pattern"] = "none"
    experts: ExpertKeys | None = None
    tied_by_default: bool = False
    text_config: bool = False
    length_is_stretched: bool = False
    plan_only: str | None = None
    plan_only_when: str | None = None
    of_full_attention: dict[str, str] = Field(default_factory=dict)
    beside: list[str] = Field(default_factory=list)
    head: Head = "tokens"

    def language(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of config.json that describes the language model. Raises InputError for what cannot be run."""
        language = config
        if self.text_config:
            text = config.get("text_config")
            if not isinstance(text, dict):
                raise InputError(f"config.json: text_config must be an object, given {text!r:.40}")
            beside = {key: config[key] for key in _OF_THE_PROJECTOR if key in config}
            language = {**beside, **text, **{key: value for key, value in config.items() if isinstance(value, dict)}}
        return {**self._of_full_attention(language), **language} if self.of_full_attention else language

    def _of_full_attention(self, config: dict[str, Any]) -> dict[str, Any]:
        listed = config.get("per_layer_config")
        if listed is None:
            return {}
        if not isinstance(listed, dict) or not all(isinstance(values, dict) for values in listed.values()):
            raise InputError(f"config.json: per_layer_config must be an object of objects, given {listed!r:.60}")
        alike = {json.dumps(values, sort_keys=True) for values in listed.values()}
        kinds = config.get("layer_types") or []
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        blocks = sorted(int(block) for block in listed if str(block).isdecimal() and int(block) < len(kinds))
        if len(alike) > 1 or (listed and full != blocks):
            raise InputError("config.json: per_layer_config must say the same of all blocks of full attention, no more")
        values: dict[str, Any] = next(iter(listed.values()), {})
        return {key: values[of] for key, of in self.of_full_attention.items() if of in values}

    def why_planned_only(self, config: dict[str, Any]) -> str | None:
        """Why the model cannot be learned, None if it can."""
        always = self.plan_only_when is None
        return self.plan_only if always or self.has(str(self.plan_only_when), config) else None

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

    def blocks(self, config: dict[str, Any]) -> int:
        """How many blocks there are. Raises InputError where nothing says it."""
        listed = None if self.layer_kinds is None else self._listed_kinds(self.layer_kinds, config)
        if listed is not None and config.get(self.block_count) is None:
            return len(listed)
        return self.dimension(self.block_count, config)

    def has(self, key: str, config: dict[str, Any]) -> bool:
        """Whether the config key, of a part of the config where it has a dot, has a value that is not false."""
        part, _, name = key.rpartition(".")
        given = config.get(part) if part else config
        value = given.get(name, self.defaults.get(key)) if isinstance(given, dict) else self.defaults.get(key)
        if value is not None and not isinstance(value, bool | int):
            raise InputError(f"config.json: {key} must be true or false, given {value!r}")
        return bool(value)

    def is_sparse(self, block: int, config: dict[str, Any]) -> bool:
        """Whether block `block` has experts."""
        if self.experts is None or (self.experts.when is not None and not self.has(self.experts.when, config)):
            return False
        if self.experts.blocks == "all":
            return True
        if self.experts.blocks == "kind":
            return self.kinds(self.blocks(config), config)[block] == self.experts.kind
        if self.experts.blocks == "first_k_dense_replace":
            listed, every = config.get("mlp_layer_types"), config.get("moe_layer_freq")
            if isinstance(listed, list) and block < len(listed):
                return bool(listed[block] == "sparse")
            if isinstance(every, list) and block < len(every):
                return bool(every[block])
            dense = self._first_sparse(config)
            return bool(block >= dense and block % self._config_value("moe_layer_freq", config) == 0)
        if block in (config.get("mlp_only_layers") or ()):
            return False
        if isinstance(listed := config.get("moe_layers"), list):  # Llama 4
            return block in listed
        return (block + 1) % self._config_value(self.experts.blocks, config) == 0

    def shares_keys(self, blocks: int, config: dict[str, Any]) -> list[bool]:
        """Whether each block attends to keys and values of an earlier one."""
        number = config.get("num_kv_shared_layers")
        number = self.defaults.get("num_kv_shared_layers", 0) if number is None else number
        if type(number) is not int or not 0 <= number < blocks:
            raise InputError(f"config.json: num_kv_shared_layers must be below {blocks}, given {number!r:.40}")
        return [block >= blocks - number for block in range(blocks)]

    def kinds(self, blocks: int, config: dict[str, Any]) -> list[str | None]:
        """Of what kind each block is, None where the architecture has one kind only."""
        rule = self.layer_kinds
        if rule is None:
            return [None] * blocks
        given = self._listed_kinds(rule, config)
        if given is not None and len(given) == blocks:
            return list(given)
        if given is not None:
            raise InputError(f"config.json: {rule.key} must name the kinds of {blocks} blocks, given {len(given)}")
        if rule.period is None:
            raise InputError(f"config.json: {rule.key} is missing; it says of what kind each of the {blocks} blocks is")
        period = rule.period
        if rule.period_key is not None and config.get(rule.period_key):
            period = self._config_value(rule.period_key, config)
        return [rule.rest if (i + 1) % period else rule.nth for i in range(blocks)]

    def _listed_kinds(self, rule: LayerKinds, config: dict[str, Any]) -> list[str] | None:
        """The kinds that config.json lists, in whatever form; None if it has no list. Raises InputError."""
        given = config.get(rule.key)
        if isinstance(given, list) and all(isinstance(kind, str) for kind in given):
            return [str(_OLD_KINDS.get(kind, kind)) for kind in given]
        if given is not None:
            raise InputError(f"config.json: {rule.key} must be a list of names, given {given!r:.60}")
        letters = None if rule.letters_key is None else config.get(rule.letters_key)
        if rule.letters is not None and letters is not None:
            if not isinstance(letters, str) or not set(letters) <= rule.letters.keys():
                allowed = ", ".join(rule.letters)
                raise InputError(f"config.json: {rule.letters_key} must consist of {allowed}, given {letters!r:.60}")
            return [rule.letters[letter] for letter in letters]
        numbers = None if rule.numbers_key is None else config.get(rule.numbers_key)
        nth, rest = rule.nth, rule.rest
        if numbers is None or nth is None or rest is None:
            return None
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise InputError(f"config.json: {rule.numbers_key} must be a list of numbers, given {numbers!r:.60}")
        return [nth if i in numbers else rest for i in range(self.dimension(self.block_count, config))]

    def _first_sparse(self, config: dict[str, Any]) -> int:
        """The number of the first block with experts."""
        key = "first_k_dense_replace"
        value = config.get(key)
        if value is None:
            value = self.defaults.get(key, 0)
        if isinstance(value, str):
            key, value = value, config.get(value, self.defaults.get(value, 0))
        if type(value) is not int or value < 0:
            raise InputError(f"config.json: {key} must be a number of blocks, given {value!r:.40}")
        return value

    def _config_value(self, key: str, config: dict[str, Any]) -> int:
        if key.isdecimal():
            return int(key)
        if key in DERIVED:
            return DERIVED[key].size({**self.defaults, **config})
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
def _found() -> dict[str, Any]:
    """The table that the libraries tell. Not yet validated: there are many."""
    text = files("allocator.model").joinpath("architectures.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def table() -> dict[str, Any]:
    """The rules of all architectures, by name, not yet validated."""
    by_hand = files("allocator.model").joinpath("architectures_by_hand.json").read_text(encoding="utf-8")
    return {**_found()["architectures"], **json.loads(by_hand)}


@cache
def _towers() -> dict[str, Any]:
    return dict(json.loads(files("allocator.model").joinpath("towers.json").read_text(encoding="utf-8")))


_SCORE = OtherTensor(name=f"{SCORE_NAME}.weight", shape=("num_labels", "hidden_size"), float32=True)


@cache
def architecture_rules(name: str) -> Architecture:
    """Raises KeyError for an architecture that is not in the table, under this name or another."""
    if name not in table() and (other := known_as(name, table())) is not None:
        rules = architecture_rules(other.of)
        others = rules.others + ([_SCORE] if other.head == "scores" else [])
        return rules.model_copy(update={"head": other.head, "others": others})
    rules, tower = table()[name], _towers().get(name, {"defaults": {}, "others": []})
    tower = _towers()[tower] if isinstance(tower, str) else tower
    together = {"others": rules["others"] + tower["others"], "defaults": tower["defaults"] | rules["defaults"]}
    if "beside" in tower:  # transformers builds none where nobody asks for it
        together["beside"] = tower["beside"]
    return Architecture.model_validate_json(json.dumps(rules | together), strict=True)


def known_architectures() -> list[str]:
    return sorted(table())


def architecture_of(config: dict[str, Any]) -> tuple[str, Architecture]:
    """Name and rules of the architecture that config.json names. Raises InputError for an unknown one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    if isinstance(name, str) and name not in table() and (other := known_as(name, table())) is not None:
        refuse_another_model(name, other, config)
        return name, architecture_rules(name)
    if isinstance(name, str) and name not in table() and (own := read_found(name)) is not None:
        return name, Architecture.model_validate_json(json.dumps(own), strict=True)
    if not isinstance(name, str) or name not in table():
        refused = _found()["refused"].get(str(name))
        raise InputError(
            f"architecture {name!r} is not known{f': {refused}' if refused else ''}; docs/models.md lists the "
            f"{len(table())} that are, and `gamma inspect --from-model` looks for the structure of another"
        )
    return name, architecture_rules(name)
