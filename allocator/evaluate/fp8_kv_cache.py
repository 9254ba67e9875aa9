"""What a KV cache of 8 bits costs: KL divergence of the model that attends to rounded keys and values."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.hf_model import open_model
from allocator.evaluate.divergence import Divergence, measure_divergence
from allocator.run.progress import Progress, silent

__all__ = ["KV_DTYPES", "measure_kv_cache", "round_to_fp8"]

KV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""vLLM's names of the KV cache dtypes; `fp8` is e4m3."""


def round_to_fp8(values: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """`values` as they come back from a cache of `dtype` with scale 1.0, vLLM's when a checkpoint has no KV scales:
    rounded to nearest even, what is too large saturated (`__nv_cvt_float_to_fp8` with `__NV_SATFINITE`, as
    vLLM's `reshape_and_cache` calls it)."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).to(values.dtype)


def measure_kv_cache(
    folder: Path, token_ids: Tensor, kv_cache_dtype: str = "fp8", batch: int = 4, progress: Progress = silent
) -> Divergence:
    """Divergence from the model in `folder` of the same model with its keys (after the rotary embedding) and values
    rounded to `kv_cache_dtype`, teacher-forced on int64 `[sequences, length]`.

    Float32, so that nothing else is rounded. Keys and values are rounded at every position, also inside a
    prompt, as vLLM attends from its cache in prefill too. Queries stay as they are; kernels that round them as well
    (FlashAttention 3) cost a little more. The model must fit into memory. Raises KeyError for another dtype.
    All of it is one unit of the step that `progress` is at.
    """
    dtype = KV_DTYPES[kv_cache_dtype]
    original, rounded = (open_model(folder, attn_implementation="sdpa") for _ in range(2))
    for name, parameter in rounded.named_parameters():  # one copy of the weights
        parameter.data = original.get_parameter(name).data
    rounded.set_attn_implementation(_register(dtype))
    return measure_divergence(original, rounded, token_ids, batch, progress)


def _register(dtype: torch.dtype) -> str:
    """An attention of transformers that is its `sdpa` on rounded keys and values. Returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        return sdpa_attention_forward(
            module, query, round_to_fp8(key, dtype), round_to_fp8(value, dtype), *arguments, **options
        )

    name = f"gamma_kv_{str(dtype).removeprefix('torch.')}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
