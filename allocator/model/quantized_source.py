"""Models whose files are quantized already: how each weight is stored, and the weight that it stands for.

Everything after the inventory sees ordinary 16-bit weights; `allocator.blocks.dequantize` makes them, one at a time,
as they are read. What cannot be read so is refused here, from config.json and headers alone.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from allocator.contract.errors import InputError
from allocator.contract.layout import Dtype16
from allocator.contract.safetensors_file import StoredTensor

__all__ = ["DequantizedTensor", "QuantizedSource", "Scheme", "dequantized_view", "split_quantization"]

_KEYS = ("quantization_config", "compression_config")
_READ = ("fp8", "compressed-tensors", "mxfp4")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_WHOLE_CODES = (1, 2, 4, 8)
"""Widths of which a 32-bit word holds a whole number; others are packed in another way from release to release."""

_OF_ACTIVATIONS = re.compile(
    r"(.*\.)?(((input|output|activation|q|k|v|kv|prob)_(scale|zero_point|global_scale))|\w+_activation_scale)"
)
"""Scales of activations and of the KV cache, which a model that is not quantized has no use for."""

Strategy = Literal["tensor", "channel", "group", "block", "tensor_group"]


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized, in the words of compressed-tensors; `block` is `[rows, columns]` of one scale."""

    format: str
    num_bits: int
    type: Literal["int", "float"]
    strategy: Strategy
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A weight as it is after dequantizing: `[N, K]`, of experts `[E, N, K]`, or `[E, K, N]` if `transposed`.

    `parts` are the tensors in the files that it is made of, by the names that compressed-tensors has for them. `path`
    and `start` are those of its codes.
    """

    parts: Mapping[str, StoredTensor]
    scheme: Scheme
    transposed: bool = False

    @property
    def in_files(self) -> tuple[StoredTensor, ...]:
        return tuple(self.parts.values())


@dataclass(frozen=True)
class QuantizedSource:
    """What config.json says of a model that is quantized already: `declaration` is its quantization_config."""

    method: str
    declaration: dict[str, Any]


def split_quantization(config: dict[str, Any], where: object) -> tuple[dict[str, Any], QuantizedSource | None]:
    """config.json without what it says of quantization, and that; None for a model that is not quantized.

    Raises InputError, with the reason, for what cannot be dequantized on reading.
    """
    for inside, part in (("", config), ("text_config", config.get("text_config"))):
        for key in _KEYS:
            declared = part.get(key) if isinstance(part, dict) else None
            if not declared:
                continue
            method = declared.get("quant_method", "unknown") if isinstance(declared, dict) else declared
            shown = f"{where}: the model is already quantized ({key}, quant_method {method!r})"
            if reason := _why_not(method, declared):
                raise InputError(f"{shown} and {reason}; give the original 16-bit or 32-bit model")
            rest = _without(config)
            if inside:
                rest[inside] = _without(rest[inside])
            return rest, QuantizedSource(method, declared)
    return config, None


def _without(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _KEYS}


def _why_not(method: Any, declared: Any) -> str | None:
    if method not in _READ or not isinstance(declared, dict):
        return f"cannot be dequantized on reading (these can: {', '.join(_READ)})"
    if method != "compressed-tensors":
        return None
    if declared.get("transform_config"):
        return "its weights are rotated (transform_config)"
    sparsity = declared.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"its weights are stored as sparse ones (format {sparsity['format']!r})"
    for group in (declared.get("config_groups") or {}).values():
        if not isinstance(group, dict):
            return "its config_groups are damaged"
        if group.get("weights") and (stored_as := _format_of(group, declared)) not in _FORMATS:
            return f"stored as {stored_as!r}, which cannot be dequantized on reading (these can: {', '.join(_FORMATS)})"
    return None


def _format_of(group: Mapping[str, Any], declared: Mapping[str, Any]) -> Any:
    return group.get("format") or declared.get("format")


def dequantized_view(
    stored: dict[str, StoredTensor], source: QuantizedSource | None, dtype: Dtype16
) -> tuple[dict[str, StoredTensor], tuple[StoredTensor, ...]]:
    """The tensors of the files as they are after dequantizing, of `dtype`, and those that only quantization needs.

    Raises InputError naming the weight whose parts are missing or do not fit together.
    """
    if source is None:
        return stored, ()
    find = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "mxfp4": _mxfp4}[source.method]
    made = {tensor.name: tensor for tensor in find(stored, source.declaration, dtype)}
    used = {part.name for tensor in made.values() for part in tensor.in_files}
    left = {name: tensor for name, tensor in stored.items() if name not in used}
    unused = {name: tensor for name, tensor in left.items() if _OF_ACTIVATIONS.fullmatch(name)}
    rest = {name: tensor for name, tensor in left.items() if name not in unused}
    for name, tensor in rest.items():
        if tensor.dtype in (*_FLOAT8, "F8_E8M0", "I8") or name.rpartition(".")[2] in ("weight_packed", "weight_scale"):
            raise InputError(f"{tensor.path}: {name} ({tensor.dtype}) is quantized, but not as {source.method} says")
    return rest | made, tuple(unused.values())


_Found = Iterator[DequantizedTensor]


def _fp8(stored: Mapping[str, StoredTensor], declared: Mapping[str, Any], dtype: Dtype16) -> _Found:
    """Weights in 8-bit floats with a scale each, or one of each row or block, under a name beside theirs."""
    size = declared.get("weight_block_size")
    for name, codes in stored.items():
        if codes.dtype not in _FLOAT8:
            continue
        scale = stored.get(f"{name}_scale_inv") or stored.get(f"{name}_scale")
        if scale is None:
            raise InputError(f"{codes.path}: {name} is {codes.dtype}, and there is no {name}_scale_inv or {name}_scale")
        scheme = Scheme("float-quantized", 8, "float", *_grid(codes, scale, size))
        yield _made(name, codes.shape, dtype, {"weight": codes, "weight_scale": scale}, scheme)


def _grid(codes: StoredTensor, scale: StoredTensor, size: Any) -> tuple[Strategy, bool, None, tuple[int, int] | None]:
    """Of what the scales are: of all codes, of rows, or of blocks of `size`."""
    rows, columns = codes.shape[-2:]
    if scale.shape in ((), (1,)) or (scale.shape == codes.shape[:-2] and len(codes.shape) == 3):
        return "tensor", True, None, None
    if scale.shape in (codes.shape[:-1], (*codes.shape[:-1], 1)):
        return "channel", True, None, None
    blocks = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if blocks and scale.shape == (*codes.shape[:-2], -(-rows // size[0]), -(-columns // size[1])):
        return "block", True, None, (size[0], size[1])
    raise InputError(
        f"{scale.path}: {scale.name} has shape {list(scale.shape)}, which is no scale of {codes.name} of shape "
        f"{list(codes.shape)} in blocks of {size}"
    )


def _compressed_tensors(stored: Mapping[str, StoredTensor], declared: Mapping[str, Any], dtype: Dtype16) -> _Found:
    groups = [group for group in (declared.get("config_groups") or {}).values() if group.get("weights")]
    for name, codes in stored.items():
        module, _, leaf = name.rpartition(".")
        scale = stored.get(f"{module}.weight_scale")
        if leaf not in ("weight_packed", "weight") or scale is None:
            continue
        group = _group_of(module, groups)
        weights = group["weights"]
        try:
            scheme = Scheme(
                format=_format_of(group, declared),
                num_bits=int(weights.get("num_bits", 8)),
                type=weights.get("type", "int"),
                strategy=weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"),
                symmetric=bool(weights.get("symmetric", True)),
                group_size=weights.get("group_size"),
                block=tuple(weights["block_structure"]) if weights.get("block_structure") else None,
            )
        except (TypeError, ValueError):
            raise InputError(f"{codes.path}: {module}: its config group is damaged: {weights!r:.100}") from None
        parts = {"weight_scale": scale, leaf: codes}
        for beside in ("weight_zero_point", "weight_global_scale", "weight_shape"):
            if (part := stored.get(f"{module}.{beside}")) is not None:
                parts[beside] = part
        yield _made(f"{module}.weight", _shape_of(module, codes, scheme, stored), dtype, parts, scheme)


def _shape_of(module: str, codes: StoredTensor, scheme: Scheme, stored: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """The shape that `codes` have unpacked. Raises InputError for what is packed in a way that is not read."""
    if f"{module}.weight_g_idx" in stored:
        raise InputError(
            f"{codes.path}: {module} is quantized in the order of activations (weight_g_idx), which is not read; give "
            "the original 16-bit or 32-bit model"
        )
    if codes.name.endswith(".weight"):
        return codes.shape
    if codes.dtype == "U8":  # two 4-bit floats
        return codes.shape[0], codes.shape[1] * 2
    if scheme.num_bits not in _WHOLE_CODES:
        raise InputError(
            f"{codes.path}: {module} has packed codes of {scheme.num_bits} bits, which every release of "
            "compressed-tensors packs in its own way; give the original 16-bit or 32-bit model"
        )
    return codes.shape[0], codes.shape[1] * (32 // scheme.num_bits)


def _group_of(module: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The config group of a module: by its name, by a pattern, or as one of a class of modules."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
        lambda target: target.isidentifier(),
    )
    for fits in ways:
        for group in groups:
            if any(fits(target) for target in group.get("targets", [])):
                return group
    raise InputError(f"{module}: it has packed tensors, but no config group of quantization_config is about it")


def _mxfp4(stored: Mapping[str, StoredTensor], declared: Mapping[str, Any], dtype: Dtype16) -> _Found:
    """Stacks of experts in 4-bit floats: `_blocks` [E, N, groups, bytes], and `_scales` [E, N, groups] of the groups;
    gpt-oss has them as `[E, K, N]` where they are not quantized."""
    for name, codes in stored.items():
        if not name.endswith("_blocks"):
            continue
        whole = name.removesuffix("_blocks")
        scale = stored.get(f"{whole}_scales")
        if scale is None or len(codes.shape) != 4 or codes.shape[:3] != scale.shape or codes.dtype != "U8":
            shown = "missing" if scale is None else f"of shape {list(scale.shape)}"
            raise InputError(f"{codes.path}: {name} has shape {list(codes.shape)}, its {whole}_scales are {shown}")
        experts, rows, groups, per_group = codes.shape
        scheme = Scheme("mxfp4-pack-quantized", 4, "float", "group", group_size=2 * per_group)
        shape = (experts, groups * per_group * 2, rows)
        yield _made(whole, shape, dtype, {"weight_packed": codes, "weight_scale": scale}, scheme, transposed=True)


def _made(
    name: str,
    shape: tuple[int, ...],
    dtype: Dtype16,
    parts: Mapping[str, StoredTensor],
    scheme: Scheme,
    *,
    transposed: bool = False,
) -> DequantizedTensor:
    codes = parts.get("weight_packed") or parts["weight"]
    return DequantizedTensor(name, dtype, shape, codes.path, codes.start, parts, scheme, transposed)
