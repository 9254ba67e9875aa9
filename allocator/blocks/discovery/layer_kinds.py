"""Where a config says of what kind each block is."""

from contextlib import suppress
from dataclasses import fields
from typing import Any

from allocator.blocks.discovery.probes import BLOCKS, blocks_key

__all__ = ["layer_kinds_rule", "window_rule"]

_PERIOD_KEYS = ("sliding_window_pattern", "full_attention_interval")


def layer_kinds_rule(config_class: Any, kinds: list[str], mixed: bool) -> dict[str, Any]:
    """The rule by which configs of a class say it. `kinds` are those of a probe: by default, or `mixed` by us."""
    known = {key.name for key in fields(config_class)}
    key = "layer_types" if "layer_types" in known else "layers_block_type"
    rule: dict[str, Any] = {"key": key}
    if "full_attn_idxs" in known:
        rule |= {"numbers_key": "full_attn_idxs", "nth": "full_attention", "rest": "conv"}
    if hasattr(config_class, "hybrid_override_pattern"):
        rule |= {"letters_key": "hybrid_override_pattern", "letters": _letters(config_class._pattern_to_list)}
    if len(set(kinds)) == 1 and key not in known:  # no key of config.json: all blocks are alike
        return rule | {"period": 1, "nth": kinds[0]}
    for period in () if mixed else range(2, 9):
        nth, rest = set(kinds[period - 1 :: period]), {k for i, k in enumerate(kinds) if (i + 1) % period}
        if len(nth) == len(rest) == 1 and nth != rest:
            rule |= {"period": period, "nth": nth.pop(), "rest": rest.pop()}
            others = (k for k in _PERIOD_KEYS if _kinds_with(config_class, {k: period + 1}) != kinds)
            key_of_period = next(others, None)
            return rule | ({"period_key": key_of_period} if key_of_period else {})
    return rule


def window_rule(config_class: Any, kinds: list[str] | None, windows_by_layer: bool) -> str:
    """Which layers see a sliding window. `kinds` are those of a probe; `windows_by_layer`: see `ServedModel`."""
    known = {key.name for key in fields(config_class)}
    if "sliding_window" not in known:
        return "none"
    if "use_sliding_window" in known:
        return "use_sliding_window"
    return "pattern" if windows_by_layer and "sliding_attention" in (kinds or ()) else "every"


def _kinds_with(config_class: Any, changes: dict[str, Any]) -> list[str]:
    return list(config_class(**({blocks_key(config_class): BLOCKS} | changes)).layer_types)


def _letters(kinds_of: Any) -> dict[str, str]:
    """What each letter of a pattern of blocks stands for, by the function that reads such patterns."""
    found = {}
    for letter in map(chr, range(33, 127)):
        with suppress(KeyError, ValueError):
            found[letter] = kinds_of(letter)[0]
    return found
