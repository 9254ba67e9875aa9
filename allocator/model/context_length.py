"""The longest sequence that vLLM lets a model have, from config.json alone: its own length, stretched by RoPE scaling.

The rule is that of `_get_and_verify_max_len` of vLLM 0.30 and later. There, as in transformers, the factor of YaRN,
Llama 3 and LongRoPE is in `max_position_embeddings` already; vLLM 0.29 took `original_max_position_embeddings` times
the factor for YaRN.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allocator.contract.errors import InputError

__all__ = ["ContextLength", "context_length", "cut_to", "rotations", "table_rows"]

_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_ALREADY_STRETCHED = {"llama3", "longrope", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
_OTHER_NAMES = {"su": "longrope", "mrope": "default", "telechat3-yarn": "yarn"}
_LENGTH_WITHOUT_ANY_KEY = 2048
_ROTATION_KEYS = ("rope_scaling", "rope_parameters")
_YARN = ("yarn", "deepseek_yarn")


@dataclass(frozen=True)
class ContextLength:
    """`default` is what vLLM takes without `--max-model-len`, `longest` what it accepts, both in tokens.

    `reason` says how `longest` follows from config.json, `hint` how it can be more, empty if it cannot.
    """

    default: int
    longest: int
    reason: str
    hint: str


def context_length(language: Mapping[str, Any], defaults: Mapping[str, int | str], stretched: bool) -> ContextLength:
    """The lengths of the model whose language part of config.json is `language`; `defaults` are its config class's.

    `stretched`: the architecture's lengths count every RoPE scaling already (Gemma 3). Raises InputError naming a key
    whose value is not allowed.
    """
    config = {**defaults, **{key: value for key, value in language.items() if value is not None}}
    for key, other in defaults.items():  # of one size under two names
        if config.get(key) == other and isinstance(other, str) and other in config:
            config[key] = config[other]
    given = {key: _positive(config[key], key) for key in _LENGTH_KEYS if key in config}
    key = min(given, key=lambda k: given[k]) if given else "max_position_embeddings"
    if "model_max_length" in given:
        key = "model_max_length"
    own = given.get(key, _LENGTH_WITHOUT_ANY_KEY)
    scalings = [] if stretched else _scalings(language)
    factor, kinds = 1.0, {kind for kind, _ in scalings}
    for kind, scaling in scalings:
        if kind not in _ALREADY_STRETCHED and "factor" in scaling:
            factor = _factor(scaling["factor"])
    derived = int(own * factor)
    longest = max(derived, given.get("model_max_length", 0))
    default = derived
    if "longrope" in kinds and "original_max_position_embeddings" in config:
        default = _positive(config["original_max_position_embeddings"], "original_max_position_embeddings")
    reason = f"{key} {own}" + (f", times the factor {factor:g} of RoPE scaling" if factor != 1 else "")
    hint = ""
    for kind, scaling in scalings:
        if kind in _YARN and _before(scaling, config) is not None and (table := table_rows(config, scaling)) > longest:
            hint = (
                f"YaRN's factor does not raise it, as max_position_embeddings counts it already: if the model is "
                f"made for {table}, set max_position_embeddings to {table} in config.json"
            )
    return ContextLength(default, longest, reason, hint)


def rotations(language: Mapping[str, Any], kind: str, own: bool) -> dict[str, Any]:
    """The parameters of the rotary embedding of layers of `kind`, empty where config.json says none.

    `own`: where those are not listed by kind, they are of the other kinds (sliding windows of Gemma 3).
    """
    given: dict[str, Any] = next((language[key] for key in _ROTATION_KEYS if isinstance(language.get(key), dict)), {})
    listed = any(isinstance(part, dict) for part in given.values())
    found = given.get(kind, {}) if listed else {} if own else given
    parameters = dict(found) if isinstance(found, dict) else {}
    for key in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"):
        if isinstance(language.get(key), int | float):
            parameters.setdefault("partial_rotary_factor", language[key])
    return parameters | {"rope_type": _kind(parameters, "rope_parameters")}


def table_rows(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Rows of the table of sines and cosines of a rotary embedding (see `rotations`). Raises InputError."""
    kind = _kind(parameters, "rope_parameters")
    own = _positive(config.get("max_position_embeddings") or _LENGTH_WITHOUT_ANY_KEY, "max_position_embeddings")
    before = _before(parameters, config)
    if kind == "longrope":
        return own + (before or 0)
    if kind in _YARN and before is not None:
        return int(before * _factor(parameters.get("factor")))
    stretches = kind in ("linear", "dynamic") and "factor" in parameters
    return int(own * _factor(parameters["factor"])) if stretches else own


def _before(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The length before it was stretched."""
    before = parameters.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    before = config.get("max_position_embeddings") if before is None else before
    return before if isinstance(before, int) else None


def cut_to(length: int, positions: int | None) -> int:
    """`length`, at most the `positions` of the model (None: no limit is known)."""
    return min(length, positions or length)


def _scalings(language: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Kind and parameters of each RoPE scaling: one, or one for each kind of layer."""
    for key in _ROTATION_KEYS:
        scaling = language.get(key)
        if not scaling:
            continue
        if not isinstance(scaling, dict):
            raise InputError(f"config.json: {key} must be an object, given {scaling!r:.40}")
        of_layers = [part for part in scaling.values() if isinstance(part, dict)]
        return [(_kind(part, key), part) for part in of_layers or [scaling]]
    return []


def _kind(scaling: Mapping[str, Any], key: str) -> str:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str):
        raise InputError(f"config.json: rope_type in {key} must be a name, given {kind!r:.40}")
    return _OTHER_NAMES.get(kind, kind)


def _factor(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InputError(f"config.json: factor of RoPE scaling must be a positive number, given {value!r:.40}")
    return float(value)


def _positive(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise InputError(f"config.json: {key} must be a positive integer, given {value!r:.40}")
    return int(value)
