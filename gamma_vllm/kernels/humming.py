"""humming, the CUDA kernels that vLLM itself depends on: 2-8 bits, symmetric and with zero points.

Its own layout on disk is ours: `weight` int32 `[N, K*b/32]`, `weight_scale` `[N, K/g]`, `zero_point` int32
`[N*b/32, K/g]`. Written for humming-kernels 0.1.19, which vLLM 0.33 pins and which is the newest. Kernels are
compiled when a (shape, width) is first multiplied and cached on disk (`HUMMING_CACHE_DIR`); `gamma warmup` does it
ahead. humming would compile some 30 for each (shape, width), one for every eight tokens up to 176; free widths multiply
the pairs, so we take its choice at `_TUNED_TOKENS` only, a third to a quarter of the kernels.

Checked without a GPU against humming's own schemas and signatures (tests/gamma_vllm/test_humming.py); tests/gpu
multiplies.
"""

import functools
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.contract.packing import pack_zero_points, unpack_zero_points
from allocator.contract.resident import HUMMING_COLUMNS, HUMMING_ROWS, pad
from gamma_vllm.kernels.base import Activation, Stack, check_columns, define, kinds_of, split_kinds, tensors_of
from gamma_vllm.kernels.humming_experts import Launch, launches_of, multiply_experts, wanted
from gamma_vllm.shards import Segment

__all__ = [
    "HummingKernel",
    "compute_config",
    "locks_of",
    "products_of",
    "schema_of",
    "schemas_of",
    "side_streams",
    "standard_tensors",
]

_LEAST_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}
_LOCKS_A_PROCESSOR = 8
_OUTPUT_ALIGNMENT = 16
"""Bytes; humming refuses other outputs (a segment that begins at a row that is no multiple of 8)."""

_SEGMENTS_VARIABLE = "GAMMA_HUMMING_SEGMENTS"
_SIDE_TOKENS = 64
"""Up to so many tokens a launch costs more than the bytes; above, products fill the GPU one after the other."""

_TUNED_TOKENS = (8, 16, 32, 64, 96, 128, 176, 256, 352, 528, 1056, 8192)
"""176 rows are humming's largest tile on Hopper, the others are multiples of tiles. What it costs: docs/kernels.md."""
_ANY_TOKENS = 1 << 30


@dataclass(frozen=True)
class HummingKernel:
    """Multiplies on NVIDIA GPUs; see `gamma_vllm.kernels.base.Kernel`. `dtype` is that of the activations."""

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)

    name = "humming"
    about = ""
    buffers = ("locks",)

    @property
    def signature(self) -> str:
        return f"humming {importlib.metadata.version('humming-kernels')}"

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it multiplies on NVIDIA GPUs, and the model is on {device}"
        if torch.version.hip is not None:
            return "it multiplies on NVIDIA GPUs, and this is a build for AMD"
        dtype = torch.get_default_dtype()  # vLLM sets it to that of the model
        least = _LEAST_CAPABILITY.get(dtype)
        if least is None:
            return f"it multiplies float16 and bfloat16 activations, and the model is in {dtype}"
        capability = torch.cuda.get_device_capability(device)
        if capability < least:
            return f"{dtype} needs compute capability {least}, {torch.cuda.get_device_name(device)} has {capability}"
        try:
            from humming.ops import launch_kernel  # noqa: F401
            from humming.transform import prepare_and_transform_humming_tensors, prepare_layer_config  # noqa: F401
            from humming.tune import get_heuristics_config  # noqa: F401
        except ImportError as error:
            return (
                f"humming-kernels cannot be imported, or is older than 0.1.19 ({error}); install the extra "
                "`gamma-vllm[cuda]`"
            )
        return None

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        return ("packed", "scale", "locks") if segment.symmetric else ("packed", "scale", "zero_point", "locks")

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """humming's order of codes, scales and zero points, padded; and the locks of its stream-K scheduler."""
        from humming.transform import prepare_and_transform_humming_tensors

        given, rows = standard_tensors(segment, tensors, self.dtype)
        schema, inputs = schema_of(segment)
        device = tensors["packed"].device
        _config, made = prepare_and_transform_humming_tensors(
            tensors=given,
            shape_n=rows,
            shape_k=segment.columns,
            weight_schema=schema,
            input_schema=inputs,
            pad_n_to_multiple=HUMMING_ROWS,
            pad_k_to_multiple=HUMMING_COLUMNS,
            has_bias=False,
            torch_dtype=self.dtype,
            device=device,
        )
        kept = {"packed": made["weight"], "scale": made["weight_scale"], "locks": locks_of(device)}
        return kept if segment.symmetric else kept | {"zero_point": made["zero_point"]}

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.layer([segment], [tensors], x)

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        """One operator a layer, so that at run time the products of one token go straight to their place."""
        check_columns(segments, x)
        return torch.ops.gamma.humming_layer(x.contiguous(), tensors_of(self, segments, tensors), kinds_of(segments))

    def index_experts(self, stack: Stack) -> list[Launch] | None:
        device = stack.tensors[next(iter(stack.tensors))].device
        return launches_of(stack, device) if wanted() else None

    def experts(
        self, w13: Stack, w2: Stack, x: Tensor, ids: Tensor, weights: Tensor, activation: Activation
    ) -> Tensor | None:
        """A launch for each width of w13, and of w2."""
        if w13.index is None or w2.index is None:
            return None
        up = multiply_experts(w13, w13.index, x.contiguous(), ids, ids.shape[1])
        products = multiply_experts(w2, w2.index, activation.apply(up), ids, 1)
        return (products.view(*ids.shape, -1).to(torch.float32) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def schema_of(segment: Segment) -> tuple[Any, Any]:
    """humming's schemas of a segment's weight and of its activations, which are not quantized."""
    return schemas_of(segment.num_bits, segment.group_size or 0, segment.symmetric is False)


@functools.cache
def schemas_of(num_bits: int, group_size: int, asymmetric: bool) -> tuple[Any, Any]:
    from humming.schema import BaseWeightSchema, HummingInputSchema

    config: dict[str, Any] = {"quant_method": "humming", "dtype": f"uint{num_bits}"}
    config |= {"group_size": group_size, "has_zero_point": asymmetric}
    return BaseWeightSchema.from_config(config), HummingInputSchema()


def standard_tensors(segment: Segment, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """The checkpoint's tensors as humming's schema names and shapes them, and the rows that they have.

    Packed zero points have to be whole words, so rows are filled up to 32 where there are zero points.
    """
    given = {"weight": tensors["packed"], "weight_scale": tensors["scale"].to(dtype)}
    if segment.symmetric:
        return given, segment.rows
    rows = _rows_with_zero_points(segment.rows)
    zero_point = tensors["zero_point"]
    if rows != segment.rows:
        more = rows - segment.rows
        given = {name: F.pad(tensor, (0, 0, 0, more)) for name, tensor in given.items()}
        unpacked = unpack_zero_points(zero_point, segment.num_bits, segment.rows)
        zero_point = pack_zero_points(F.pad(unpacked, (0, 0, 0, more)), segment.num_bits)
    return given | {"zero_point": zero_point}, rows


def _rows_with_zero_points(rows: int) -> int:
    return pad(rows, 32)


def locks_of(device: torch.device) -> Tensor:
    """Zeros; each layer has its own, since layers may run side by side on several streams."""
    count = torch.cuda.get_device_properties(device).multi_processor_count * _LOCKS_A_PROCESSOR
    return torch.zeros(count, dtype=torch.int32, device=device)


@functools.cache
def layer_config(
    rows: int, columns: int, group_size: int, num_bits: int, asymmetric: bool, dtype: torch.dtype, device: torch.device
) -> Any:
    """humming's description of one GEMM, which its kernels are compiled for."""
    from humming.transform import prepare_layer_config

    schema, inputs = schemas_of(num_bits, group_size, asymmetric)
    return prepare_layer_config(
        shape_n=_rows_with_zero_points(rows) if asymmetric else rows,
        shape_k=columns,
        weight_schema=schema,
        input_schema=inputs,
        pad_n_to_multiple=HUMMING_ROWS,
        pad_k_to_multiple=HUMMING_COLUMNS,
        has_bias=False,
        torch_dtype=dtype,
        device=device,
    )


@functools.cache
def compute_config(gemm_type: str = "dense") -> str:
    """What vLLM's own settings ask of humming."""
    from vllm import envs

    return json.dumps(
        {
            "use_batch_invariant": bool(getattr(envs, "VLLM_BATCH_INVARIANT", False)),
            "use_f16_accum": bool(getattr(envs, "VLLM_HUMMING_USE_F16_ACCUM", False)),
            "gemm_type": gemm_type,
        }
    )


def tuning_config(config: Any, device: torch.device) -> str:
    """The kernel for each number of tokens: humming's choice at the next of `_TUNED_TOKENS`."""
    from humming.tune import get_heuristics_config

    settings, intervals, low = json.loads(compute_config()), [], 0
    for tokens in _TUNED_TOKENS:
        high = tokens if tokens != _TUNED_TOKENS[-1] else _ANY_TOKENS
        intervals.append([low, high, get_heuristics_config(config, shape_m=tokens, device=device, **settings)])
        low = high
    return json.dumps(intervals)


@functools.cache
def kernels_of(
    rows: int, columns: int, group_size: int, num_bits: int, asymmetric: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What humming launches, int64 on the CPU: for each interval of tokens its ends, the kernel and the SMs.

    Compiles what its cache on disk does not have.
    """
    from humming.kernel.humming import HummingKernel as Library

    config = layer_config(rows, columns, group_size, num_bits, asymmetric, dtype, device)
    made: Tensor = Library.prepare_kernels(config.to_str(), compute_config(), tuning_config(config, device), device)
    return made


class _Product(NamedTuple):
    """One of a layer's products: rows `start` to `start + rows` of its output. `kernels` None: 16 bits. padded: humming
    makes more rows than there are. tensors: how many it takes."""

    start: int
    rows: int
    kernels: Tensor | None
    asymmetric: bool
    padded: bool

    @property
    def tensors(self) -> int:
        return 1 if self.kernels is None else 4 if self.asymmetric else 3


@functools.cache
def products_of(kinds: tuple[int, ...], columns: int, dtype: torch.dtype, device: torch.device) -> list[_Product]:
    """What a layer's operator has to do, of its `kinds_of`. Looked up: Python takes longer than small products do."""
    products, start = [], 0
    for rows, group_size, bits, symmetric in split_kinds(kinds):
        kernels = None if bits == 16 else kernels_of(rows, columns, group_size, bits, not symmetric, dtype, device)
        padded = not symmetric and _rows_with_zero_points(rows) != rows
        products.append(_Product(start, rows, kernels, not symmetric, padded))
        start += rows
    return products


def _layer(x: Tensor, tensors: list[Tensor], kinds: list[int]) -> Tensor:
    """`x` `[..., columns]` times each segment (see `kinds_of`), joined along the rows."""
    columns, total = x.shape[-1], sum(kinds[::4])
    flat = x.view(-1, columns)
    tokens = flat.shape[0]
    output = flat.new_empty(tokens, total)
    if not tokens:
        return output.view(*x.shape[:-1], total)
    held = iter(tensors)
    products = [
        (product, [next(held) for _ in range(product.tensors)])
        for product in products_of(tuple(kinds), columns, x.dtype, x.device)
    ]
    if _side_by_side() and tokens <= _SIDE_TOKENS:
        _multiply_side_by_side(products, flat, output)
    else:
        for product, of_product in products:
            _multiply(product, flat, of_product, output)
    return output.view(*x.shape[:-1], total)


def _multiply_side_by_side(products: list[tuple[_Product, list[Tensor]]], flat: Tensor, output: Tensor) -> None:
    """Each product on a stream of its own. What is forked waits for the input alone, so the first one, which stays, is
    launched last."""
    here = torch.cuda.current_stream(flat.device)
    streams = side_streams(flat.device, len(products) - 1)
    for stream, (product, held) in zip(streams, products[1:], strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            _multiply(product, flat, held, output)
    _multiply(products[0][0], flat, products[0][1], output)
    for stream in streams:
        here.wait_stream(stream)


def _multiply(product: _Product, flat: Tensor, held: list[Tensor], output: Tensor) -> None:
    """Activations `[tokens, columns]` times a segment, to its place in `output`."""
    from humming.ops import launch_kernel

    tokens, total = output.shape
    place = output if product.rows == total else output.narrow(1, product.start, product.rows)
    # A slice of the output is contiguous, as humming wants it, for one token; and if it is the whole.
    in_place = tokens == 1 or product.rows == total
    if product.kernels is None:
        if in_place:
            torch.mm(flat, held[0].t(), out=place)
        else:
            place.copy_(F.linear(flat, held[0]))
        return
    in_place = in_place and not product.padded and 2 * product.start % _OUTPUT_ALIGNMENT == 0
    made = launch_kernel(
        configs=product.kernels,
        inputs=flat,
        weight=held[0],
        weight_scale=held[1],
        zero_point=held[2] if product.asymmetric else None,
        outputs=place if in_place else None,
        locks=held[-1],
    )
    if not in_place:
        place.copy_(made[:, : product.rows])


def _side_by_side() -> bool:
    value = os.environ.get(_SEGMENTS_VARIABLE, "in-turn")
    if value not in ("in-turn", "side-by-side"):
        raise ValueError(f"{_SEGMENTS_VARIABLE}={value!r}: expected in-turn or side-by-side")
    return value == "side-by-side"


@functools.cache
def side_streams(device: torch.device, count: int) -> "list[torch.cuda.Stream]":
    """The same ones for all layers, which follow each other."""
    return [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]


def _fake(x: Tensor, tensors: list[Tensor], kinds: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(kinds[::4])))


define("humming_layer", "(Tensor x, Tensor[] tensors, int[] kinds) -> Tensor", _layer, _fake)
