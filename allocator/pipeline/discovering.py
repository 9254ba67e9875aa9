"""Finds the structure of a model that the table of architectures does not have."""

from importlib.metadata import version
from pathlib import Path

from allocator.contract.errors import InputError
from allocator.model.architectures import architecture_of, known_architectures
from allocator.model.found_here import keep_found
from allocator.model.hf_config import read_config

__all__ = ["discover"]


def discover(folder: Path) -> Path | None:
    """Find the structure of the model in `folder` with the transformers and vLLM that are installed, and keep it for
    all verbs on this machine; the file it is kept in is returned, None if gamma knows the architecture anyway.

    Raises InputError saying what is missing for the model to be learned and served.
    """
    from allocator.blocks.discovery.table import found_rules, found_wrapper, wrappers
    from allocator.blocks.discovery.vllm_source import vllm_version

    config = read_config(folder)
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(name, str) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'}: architectures and model_type must name one model class")
    if name in known_architectures():
        return None
    versions = {"transformers": version("transformers"), "vllm": vllm_version()}
    rules = found_wrapper(name) if name in wrappers() else found_rules(name, config["model_type"])
    path = keep_found(name, rules, versions)
    architecture_of(config)
    return path
