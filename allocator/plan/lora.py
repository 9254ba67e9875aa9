"""What vLLM sets aside for LoRA adapters when it loads a model: buffers of the largest rank for every adapter at once.

Mirrors `create_lora_weights` of `lora/layers/*.py` and `LoRAModelManager._create_lora_modules` of vLLM 0.32. A layer
that vLLM fuses has one pair of buffers for each of its modules; A `[rank, in_features]`, B `[out_features, rank]`, in
16 bits. Tensor parallel ranks divide B of a column-parallel layer and A of a row-parallel one, the other is whole on
each; buffers of the vocabulary are never divided.
"""

from allocator.contract.errors import InputError
from allocator.contract.resident import rank_shape
from allocator.model.shape import ModelShape, ModuleKind
from allocator.plan.kv_cache import stage_layers
from allocator.plan.schema import LoraRequest, PlanRequest

__all__ = ["check_lora", "lora_activation_bytes", "lora_bytes"]

VOCABULARY_ADAPTED = {
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
}
"""Architectures whose vLLM classes name `embedding_modules`: embedding and lm_head get buffers too."""

_LARGEST_VOCABULARY = 258048
_MOST_SLICES = 3


def lora_bytes(shape: ModelShape, request: PlanRequest) -> int:
    """Bytes of all buffers on a rank of the stage that has most of them; 0 without adapters."""
    if request.lora is None:
        return 0
    stages = stage_layers(shape.blocks, request.pipeline_parallel_size)
    totals = [0] * len(stages)
    for kind in _adapted(shape, request.lora):
        nbytes = 2 * request.lora.max_loras * request.lora.max_lora_rank * _numbers(kind, shape, request)
        if kind.blocks:
            for i, stage in enumerate(stages):
                totals[i] += nbytes * sum(block in stage for block in kind.blocks)
        else:
            totals[-1 if kind.role == "lm_head" else 0] += nbytes
    return max(totals)


def lora_activation_bytes(request: PlanRequest, tokens: int) -> int:
    """Bytes of what lies between A and B: float32, of the largest rank, for each token and module of a fused layer."""
    return 0 if request.lora is None else 4 * _MOST_SLICES * tokens * request.lora.max_lora_rank


def check_lora(shape: ModelShape, lora: LoraRequest) -> None:
    """Raises InputError for adapters that vLLM or the plugin would refuse, naming what is possible."""
    possible = [kind for kind in shape.modules if _may_be_adapted(kind, shape)]
    names = sorted({name for kind in possible for name in _names(kind)})
    if any(kind.kind == "mla" for kind in shape.attention):
        raise InputError(f"--enable-lora: adapters of {shape.architecture} are not planned yet")
    unknown = sorted(set(lora.target_modules or ()) - set(names) - {n for k in shape.modules for n in _names(k)})
    if unknown:
        raise InputError(f"--lora-target-modules {unknown[0]!r} is no module of the model; possible are {names}")
    adapted = _adapted(shape, lora)
    if any(kind.experts for kind in adapted):
        raise InputError(
            "--enable-lora: the plugin's kernel for experts takes no adapters; name other modules, e.g. "
            "--lora-target-modules qkv_proj,o_proj"
        )
    if any(kind.role != "linear" for kind in adapted) and shape.vocabulary > _LARGEST_VOCABULARY:
        raise InputError(
            f"--enable-lora: vLLM takes vocabularies of at most {_LARGEST_VOCABULARY}, the model has "
            f"{shape.vocabulary}; name modules without embed_tokens and lm_head in --lora-target-modules"
        )
    if not adapted:
        raise InputError(f"--lora-target-modules {lora.target_modules}: nothing to adapt; possible are {names}")


def _adapted(shape: ModelShape, lora: LoraRequest) -> list[ModuleKind]:
    """The modules that get buffers. Naming one module of a fused layer, or the layer, means all of it."""
    possible = [kind for kind in shape.modules if _may_be_adapted(kind, shape)]
    if lora.target_modules is None:
        return possible
    named = {_layer(kind) for kind in possible if set(lora.target_modules) & set(_names(kind))}
    return [kind for kind in possible if _layer(kind) in named]


def _may_be_adapted(kind: ModuleKind, shape: ModelShape) -> bool:
    return kind.role == "linear" or shape.architecture in VOCABULARY_ADAPTED


def _layer(kind: ModuleKind) -> str:
    return kind.fused or kind.name


def _names(kind: ModuleKind) -> list[str]:
    return [name.rpartition(".")[2] for name in (kind.name, kind.fused) if name]


def _numbers(kind: ModuleKind, shape: ModelShape, request: PlanRequest) -> int:
    """Columns of A and rows of B on one rank, of one module with all its experts."""
    rows, columns = kind.shape
    match kind.split:
        case "embedding" | "head":
            return rows + columns
        case "tied":
            return 2 * (rows + columns)  # vLLM has an embedding and a head of the same weights
    return sum(rank_shape(kind.shape, kind.split, request.ranks, shape.heads)) * (kind.experts or 1)
