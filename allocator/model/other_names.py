"""Architectures that vLLM serves with a class of the table under another name.

Without a head for tokens: `XForSequenceClassification` (a reranker, a classifier) and `XModel` (an embedding model) are
the blocks of `XForCausalLM`. Renamed: vLLM registers the same class for both names; a test compares with its registry.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allocator.contract.errors import InputError

__all__ = ["RENAMED", "SCORE_NAME", "Head", "OtherName", "known_as", "refuse_another_model", "without_head"]

Head = Literal["tokens", "scores", "states"]
"""What stands behind the last block: an lm_head, a matrix of scores, or nothing."""

SCORE_NAME = "score"
"""The matrix of scores: `GenericForSequenceClassification` of transformers, `as_seq_cls_model` of vLLM."""

EMBEDDING_MODULES = "modules.json"
"""What sentence-transformers puts behind a model, and in which folders, by a file of this name."""

_HEADS: dict[str, Head] = {"ForSequenceClassification": "scores", "Model": "states"}
_WITH_HEAD = "ForCausalLM"


@dataclass(frozen=True)
class OtherName:
    """The architecture `of` of the table under another name. `model_type` is what transformers calls its config where
    it does not know the model's own, `without` config keys that make it another model, and why."""

    of: str
    head: Head = "tokens"
    model_type: str | None = None
    without: dict[str, str] = field(default_factory=dict)


_BIASES = dict.fromkeys(("bias", "qkv_bias"), "its biases are not those of Llama")
_CLIPPED = {"clip_qkv": "Llama, which vLLM runs it as, does not clip", "use_sliding_window": "Llama has no windows"}
RENAMED = {
    "ExaoneMoEForCausalLM": OtherName("ExaoneMoeForCausalLM"),
    "IQuestCoderForCausalLM": OtherName("LlamaForCausalLM", model_type="llama", without=_CLIPPED),
    "InternLM3ForCausalLM": OtherName("LlamaForCausalLM", model_type="llama", without=_BIASES),
    "LLaMAForCausalLM": OtherName("LlamaForCausalLM"),
    "TeleChat3ForCausalLM": OtherName("LlamaForCausalLM", model_type="llama"),
}


def known_as(name: str, table: Collection[str]) -> OtherName | None:
    """What the architecture `name`, which is not in `table`, is called there; None for one that is not there at all."""
    if name in RENAMED:
        return RENAMED[name]
    for suffix, head in _HEADS.items():
        of = name.removesuffix(suffix) + _WITH_HEAD
        if name.endswith(suffix) and of in table:
            return OtherName(of, head)
    return None


def without_head(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of an embedding model that names the class with an lm_head (Qwen3-Embedding), whose files often have
    none: with the name of the class without. What it is, the modules.json of sentence-transformers says."""
    match config.get("architectures"):
        case [str(name)] if name.endswith(_WITH_HEAD) and (folder / EMBEDDING_MODULES).exists():
            return config | {"architectures": [name.removesuffix(_WITH_HEAD) + "Model"]}
    return config


def refuse_another_model(name: str, other: OtherName, config: dict[str, Any]) -> None:
    """Raises InputError for a model `name` that is not what `other` says it is: by a key that makes it another, or
    because its tokens see those behind them."""
    for key, reason in other.without.items():
        if config.get(key):
            raise InputError(f"config.json: {name} with {key} cannot be learned: {reason}")
    if other.head == "tokens":
        return
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        key = "is_causal" if config.get("is_causal") is False else "use_bidirectional_attention"
        raise InputError(
            f"config.json: {key} is {config[key]!r}: each token of this {name} sees those behind it, and the blocks "
            "that are known see those before it only"
        )
