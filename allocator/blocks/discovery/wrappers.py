"""Multimodal models whose language model is one that is known by itself: the same rules under other names.

What stands beside the language model, a vision tower and its projector, is copied and served untouched.
"""

from typing import Any

import torch

from allocator.blocks.discovery.probes import Probe, probe_of
from allocator.blocks.discovery.tensors import single_experts
from allocator.blocks.discovery.told import MAY_BE_ZERO
from allocator.contract.errors import InputError
from allocator.model.architectures import Architecture
from allocator.model.shape import shape_of

__all__ = ["find_wrapper"]

_BLOCKS = 4


def find_wrapper(model_type: str, architecture: str, text: Architecture) -> Architecture:
    """The rules of `architecture`, whose config class has `model_type`, by those of its language model.

    Raises InputError where its language model is not that of `text`.
    """
    try:
        made = _built(model_type, architecture)
    except InputError:
        raise
    except Exception as error:  # transformers has as many ways to fail as it has models
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise InputError(f"{architecture}: transformers does not build it ({reason})") from error
    inner, outer = (block.removesuffix("{i}").removesuffix(".") for block in (text.block, f"{made.block_prefix}.{{i}}"))
    inner, outer = inner.rpartition(".")[0], outer.rpartition(".")[0]

    def renamed(name: str) -> str:
        if name.startswith(f"{inner}."):
            return f"{outer}.{name.removeprefix(f'{inner}.')}"
        return made.head if name == text.lm_head.name else name

    rules = text.model_dump(mode="json")
    rules["block"] = renamed(text.block)
    for part in ("embedding", "lm_head"):
        rules[part]["name"] = renamed(rules[part]["name"])
    for other in rules["others"]:
        other["name"] = renamed(other["name"])
    rules["text_config"] = True
    for key in MAY_BE_ZERO:  # the class has another default than that of the language model alone: without it
        if not hasattr(made.config.get_text_config(), key):
            rules["defaults"].pop(key, None)
    config = made.config.to_dict() | {"architectures": [architecture]}
    said = _names(shape_of(architecture, Architecture.model_validate(rules), config))
    stored = single_experts(made.stored, said, "rows" if text.experts is None else text.experts.layout)
    if missing := sorted(name for name in said if stored.get(name) != said[name]):
        raise InputError(
            f"{architecture}: its language model is not that of its kind: {missing[0]} is "
            f"{stored.get(missing[0])}, not {said[missing[0]]}"
        )
    rules["beside"] = sorted(
        {_part(name, said) for name in stored if name not in said and name != f"{made.head}.weight"}
    )
    return Architecture.model_validate(rules)


def _built(model_type: str, architecture: str) -> Probe:
    """A model of few blocks on the meta device, otherwise of the sizes that its config class has."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    # Towers that a class leaves out by default are in published models.
    left_out = [name for name in kind.sub_configs if getattr(kind(), name, None) is None]
    config: Any = kind(**{name: {} for name in left_out})
    language = config.get_text_config()
    language.num_hidden_layers, language.tie_word_embeddings = _BLOCKS, False
    config.tie_word_embeddings = False
    if getattr(language, "layer_types", None):
        language.layer_types = language.layer_types[:_BLOCKS]
    for key in ("num_experts", "n_routed_experts", "num_local_experts"):
        if getattr(language, key, None):
            setattr(language, key, 2 * (getattr(language, "num_experts_per_tok", 1) or 1))
    with torch.device("meta"):
        return probe_of(getattr(transformers, architecture)(config), config)


def _names(shape: Any) -> dict[str, tuple[int, ...]]:
    said: dict[str, tuple[int, ...]] = {}
    for module in shape.modules:
        for block in module.blocks or (0,):
            for expert in range(module.experts or 1):
                said[f"{module.name}.weight".replace("{i}", str(block)).replace("{e}", str(expert))] = module.shape
    return said | {name: other.shape for other in shape.others for name in other.names()}


def _part(name: str, said: dict[str, tuple[int, ...]]) -> str:
    """The shortest beginning of `name` that no name of the language model has."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        begin = ".".join(parts[:count]) + "."
        if not any(other.startswith(begin) for other in said):
            return begin
    return name
