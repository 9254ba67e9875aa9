"""The second declaration of the same tensors: `quant_method: compressed-tensors`, format pack-quantized.

Stock vLLM and Hugging Face transformers read it without this package. They allow one format inside each layer that
vLLM fuses, so not every assignment can be declared this way. Widths 2, 4 and 8 are packed alike by every release of
compressed-tensors; the dense bit stream of 3, 5 and 6 bits is that of 0.18 and later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from allocator.contract.layout import ModuleFormat

__all__ = ["QUANT_METHOD", "compressed_tensors_config", "unequal_groups"]

QUANT_METHOD = "compressed-tensors"

_FORMAT = "pack-quantized"
_FIRST_DENSE_VERSION = "0.18.0"


def compressed_tensors_config(modules: Mapping[str, ModuleFormat]) -> dict[str, Any]:
    """`config.json["quantization_config"]` of an assignment: one config group a format, targets by exact name.

    Modules at 16 bits stand in `ignore`.
    """
    targets: dict[tuple[int, int, bool], list[str]] = {}
    for name, module in modules.items():
        if module.quantized:
            assert module.group_size is not None
            assert module.symmetric is not None
            targets.setdefault((module.num_bits, module.group_size, module.symmetric), []).append(name)
    groups = {}
    for number, ((num_bits, group_size, symmetric), names) in enumerate(sorted(targets.items())):
        weights = {
            "num_bits": num_bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group",
            "group_size": group_size,
            "dynamic": False,
            "actorder": None,
        }
        groups[f"group_{number}"] = {
            "targets": names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": _FORMAT,
        }
    return {
        "quant_method": QUANT_METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "version": _FIRST_DENSE_VERSION,
        "config_groups": groups,
        "ignore": [name for name, module in modules.items() if not module.quantized],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def unequal_groups(
    modules: Mapping[str, ModuleFormat], fused_groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, str]]:
    """The fused layers whose modules are stored differently: layer -> module -> `4 bits`.

    The experts of a block count as one layer, since stock vLLM wants one format for all of their projections.
    """
    joined: dict[str, list[str]] = {}
    for layer, members in fused_groups.items():
        joined.setdefault(layer.removesuffix(".w13").removesuffix(".w2"), []).extend(members)
    unequal = {}
    for layer, members in joined.items():
        formats = {name: modules[name] for name in members if name in modules}
        if len({(f.num_bits, f.group_size, f.symmetric) for f in formats.values()}) > 1:
            one_width = len({f.num_bits for f in formats.values()}) == 1
            unequal[layer] = {name: _words(f, one_width) for name, f in formats.items()}
    return unequal


def _words(module: ModuleFormat, whole: bool) -> str:
    if not whole:
        return f"{module.num_bits} bits"
    return f"{module.num_bits} bits in groups of {module.group_size}{'' if module.symmetric else ' with zero points'}"
