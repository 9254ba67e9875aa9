"""Writes `allocator/model/architectures.json`: the rules of every architecture that transformers and vLLM both know.

`python -m allocator.blocks.discovery.table` (`make architectures`) writes it anew; a new family is a line in
`architectures_by_hand.json` at most.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from allocator.blocks.discovery.generate import find_architecture
from allocator.blocks.discovery.vllm_source import language_model_of, served_architectures, vllm_version
from allocator.blocks.discovery.wrappers import find_wrapper
from allocator.contract.documents import write_atomically
from allocator.contract.errors import InputError

__all__ = ["TABLE", "candidates", "found_rules", "found_wrapper", "make_table", "wrappers", "written"]

TABLE = Path(str(files("allocator.model").joinpath("architectures.json")))
_KNOWN_BETTER: dict[str, dict[str, Any]] = {
    # vLLM counts Gemma 3's scaling of RoPE in max_position_embeddings (`_get_and_verify_max_len`).
    "Gemma3ForCausalLM": {"length_is_stretched": True},
    "KimiLinearForCausalLM": {"plan_only": "its convolutions are in other parts in files than in transformers"},
}
_ALTUP = "its blocks hand on four hidden states side by side (AltUp), of which learning block by block knows one"
_REFUSED = {"Gemma3nForCausalLM": _ALTUP, "Gemma3nForConditionalGeneration": _ALTUP}
"""Why, where what was looked for and not found is not the reason."""


def candidates() -> dict[str, str]:
    """Architecture -> the type of its config, for all causal language models that both libraries have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    served, found = served_architectures(), {}
    for model_type, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [classes] if isinstance(classes, str) else classes:
            if name in served and name.endswith(("ForCausalLM", "LMHeadModel")):
                found[name] = model_type
    return dict(sorted(found.items()))


def found_rules(architecture: str, model_type: str) -> dict[str, Any]:
    """The rules of one architecture as they stand in the table. Raises InputError saying why there are none."""
    _refuse(architecture)
    rules = find_architecture(model_type, architecture).model_dump(exclude_defaults=True, mode="json")
    return rules | _KNOWN_BETTER.get(architecture, {})


def wrappers() -> dict[str, tuple[str, str]]:
    """Multimodal architecture -> the type of its config, and the type of that of its language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    served, found = served_architectures(), {}
    for model_type, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if name not in served or not name.endswith("ForConditionalGeneration"):
            continue
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # parts of it need packages that are not here
            continue
        if config.get_text_config() is not config and name not in found:
            found[name] = model_type, config.get_text_config().model_type
    return dict(sorted(found.items()))


def found_wrapper(architecture: str) -> dict[str, Any]:
    """The rules of a multimodal architecture as they stand in the table. Raises InputError."""
    _refuse(architecture)
    model_type, text_type = wrappers()[architecture]
    known = candidates()
    name = next((name for name, kind in known.items() if kind == text_type), language_model_of(architecture))
    if name not in known:
        raise InputError(f"{architecture}: its language model ({text_type}) is none that is known by itself")
    text = find_architecture(known[name], name, inside_another=True)
    rules = find_wrapper(model_type, architecture, text).model_dump(exclude_defaults=True, mode="json")
    return rules | _KNOWN_BETTER.get(name, {})


def _refuse(architecture: str) -> None:
    if architecture in _REFUSED:
        raise InputError(f"{architecture}: {_REFUSED[architecture]}")


def make_table() -> dict[str, Any]:
    """The whole table. Takes some minutes."""
    rules, refused = {}, {}
    for name, model_type in candidates().items():
        try:
            rules[name] = found_rules(name, model_type)
        except InputError as error:
            refused[name] = str(error)
    for name in wrappers():
        try:
            rules[name] = found_wrapper(name)
        except InputError as error:
            refused[name] = str(error)
    versions = {"transformers": version("transformers"), "vllm": vllm_version()}
    return versions | {"architectures": rules, "refused": refused}


def written(table: dict[str, Any]) -> str:
    """JSON with one line for each tensor."""
    return "".join(_lines(table, 0)) + "\n"


def _lines(value: Any, depth: int) -> Iterator[str]:
    indent = "  " * (depth + 1)
    if isinstance(value, dict) and value and (depth < 3):
        yield "{\n"
        for place, (key, item) in enumerate(value.items()):
            yield f"{indent}{json.dumps(key)}: "
            yield from _lines(item, depth + 1)
            yield "\n" if place == len(value) - 1 else ",\n"
        yield "  " * depth + "}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield "[\n" + ",\n".join(indent + json.dumps(item) for item in value) + "\n" + "  " * depth + "]"
    else:
        yield json.dumps(value)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    made = make_table()
    write_atomically(TABLE, written(made))
    print(f"{TABLE}: {len(made['architectures'])} architectures, {len(made['refused'])} refused")
