"""What vLLM takes on a GPU besides weights and KV cache: activations, CUDA graphs, buffers outside PyTorch.

vLLM measures these when it starts (`gpu_worker.determine_available_memory`): it runs `max_num_batched_tokens` tokens
and samples `max_num_seqs` sequences, captures graphs on trial, and gives the KV cache what is left of
`gpu_memory_utilization`. The formulas here predict that run. Their constants are fitted to public measurements:

    [A] llm-d planner, "Capacity Planner Accuracy Report, vLLM v0.19.0, H100-80GB", 49 runs of 28 models, and their logs

They ran `vllm serve` with 8192 batched tokens and 1024 sequences, the defaults of an H100.
"""

from allocator.contract.resident import Ranks
from allocator.model.shape import ModelShape
from allocator.plan.schema import PlanRequest

__all__ = [
    "activation_bytes",
    "attention_workspace_bytes",
    "capture_sizes",
    "cuda_graph_bytes",
    "non_torch_bytes",
    "slack_bytes",
]

MIB = 1 << 20

SAMPLER_BYTES = 15.5
"""Bytes a sequence and vocabulary entry while sampling: 16-bit logits, their float32 copy, and the buffers of top-k and
top-p. 14.8 to 15.5 in [A]: Llama-3.1-8B, Qwen2.5-7B, Qwen3-8B, phi-4, granite-3.1-2b, Gemma-3-27B (the most)."""

HIDDEN_COPIES = 4.4
"""Hidden states alive at the peak of the MLP, besides its own three intermediates: 4.2 to 4.3 in [A] (CodeLlama-7B,
granite-3.1-8b, whose small vocabularies leave the peak to the MLP)."""

EXPERT_WORKSPACE = 1.3
"""Workspace of a mixture of experts over its two intermediates: 1.1 to 1.25 in [A] (Qwen1.5-MoE, DeepSeek-V2-Lite,
Qwen3-30B-A3B). It stays allocated, so it comes on top of the sampler."""

NON_TORCH_BYTES = 280 * MIB
"""Kernels and handles of cuBLAS and CUDA outside PyTorch on one GPU: 0.24 to 0.27 GiB in [A]."""
NON_TORCH_PARALLEL_BYTES = 2180 * MIB
"""The same with tensor parallelism, whose all-reduce buffers are most of it: 2.06 to 2.17 GiB in [A]."""

FLASHINFER_WORKSPACE_BYTES = 394 * MIB
"""`VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE` of vLLM."""

PIECEWISE_BASE_BYTES = 72 * MIB
PIECEWISE_COPIES = 1.35
"""The first piecewise graph of a size: a base, and the intermediates of its MLP with what surrounds them. From the line
`Estimated PIECEWISE CUDA graph memory` of 40 logs of [A]; likewise the bytes of each further graph, by layers."""
PIECEWISE_BYTES_PER_LAYER = 0.22 * MIB
FULL_BYTES_PER_LAYER = 0.16 * MIB
LATENT_KERNELS = 1.6
"""Kernels of a layer with latent attention, over those of one with grouped heads: by as much its graphs are larger."""
_GRAPH_LEAST_BYTES = 1 * MIB

ATTENTION_SPLITS = 32
"""Partial results of attention in a whole-model graph, in float32 for each token: 32 splits of every head in [A]
(256 MiB for 512 tokens and 32 heads of 128)."""


def activation_bytes(shape: ModelShape, request: PlanRequest, batched_tokens: int) -> int:
    """Peak of activations while vLLM profiles, bytes on one rank.

    The larger of two moments: the widest layer (gate and up, their product, and the hidden states around
    them), and sampling, where every rank holds the logits of all sequences. What the experts of a sparse block
    need comes on top.
    """
    ranks = request.ranks
    sizes = [_layer_bytes(shape, ranks, batched_tokens), _sampling_bytes(shape, request, batched_tokens)]
    return int(max(sizes)) + _expert_bytes(shape, ranks, batched_tokens)


def _layer_bytes(shape: ModelShape, ranks: Ranks, tokens: int) -> float:
    size = ranks.tensor_parallel_size
    widest = 0.0
    if any(kind.role == "linear" and not kind.experts and ".mlp." in kind.name for kind in shape.modules):
        widest = 3 * shape.intermediate_size / size
    heads = shape.heads
    attention = (2 * heads.query + 2 * max(heads.key_value, size)) * heads.size / size
    return 2 * tokens * (max(widest, attention) + HIDDEN_COPIES * shape.hidden_size)


def _sampling_bytes(shape: ModelShape, request: PlanRequest, tokens: int) -> float:
    hidden = 2 * tokens * shape.hidden_size
    return SAMPLER_BYTES * min(request.max_num_seqs, tokens) * shape.vocabulary + hidden


def _expert_bytes(shape: ModelShape, ranks: Ranks, tokens: int) -> int:
    if shape.experts is None:
        return 0
    experts = shape.experts
    size = experts.size if ranks.expert_parallel else experts.size / ranks.tensor_parallel_size
    rows = tokens * experts.per_token
    return int(EXPERT_WORKSPACE * 2 * rows * (max(2 * size, shape.hidden_size) + size))


def capture_sizes(max_num_seqs: int, batched_tokens: int, is_blackwell: bool = False) -> list[int]:
    """Batch sizes that vLLM captures graphs for (`VllmConfig._set_cudagraph_sizes`)."""
    largest = min(max_num_seqs * 2, 1024 if is_blackwell else 512, batched_tokens)
    sizes = [n for n in (1, 2, 4) if n <= largest]
    sizes += list(range(8, min(largest + 1, 256), 8)) + list(range(256, largest + 1, 16))
    if batched_tokens <= largest:
        sizes.append(batched_tokens)
    if max_num_seqs <= largest:
        sizes.append(max_num_seqs)
    return sorted(set(sizes))


def cuda_graph_bytes(shape: ModelShape, request: PlanRequest, batched_tokens: int, is_blackwell: bool) -> int:
    """What vLLM reserves for CUDA graphs (`profile_cudagraph_memory`); 0 with `--enforce-eager`.

    Each batch size is captured piecewise and, if decoding can have it, as a whole. Of each kind the first graph
    brings the buffers, every further one about the same for each layer.
    """
    if request.enforce_eager:
        return 0
    piecewise = capture_sizes(request.max_num_seqs, batched_tokens, is_blackwell)
    whole = [size for size in piecewise if size <= request.max_num_seqs]
    layers = -(-shape.blocks // request.pipeline_parallel_size)
    size = request.tensor_parallel_size
    first = PIECEWISE_BASE_BYTES + PIECEWISE_COPIES * 6 * piecewise[-1] * shape.intermediate_size / size
    value_size = max(shape.attention[0].value_size, shape.heads.size)
    if shape.attention[0].kind == "mla":
        value_size = shape.attention[0].key_size
        layers = int(layers * LATENT_KERNELS)
    first_whole = 4 * whole[-1] * shape.heads.query / size * value_size * ATTENTION_SPLITS
    each = 1 if request.lora is None else 2  # with adapters in the batch and without (`cudagraph_specialize_lora`)
    further = (each * len(piecewise) - 1) * max(PIECEWISE_BYTES_PER_LAYER * layers, _GRAPH_LEAST_BYTES)
    further += (each * len(whole) - 1) * max(FULL_BYTES_PER_LAYER * layers, _GRAPH_LEAST_BYTES)
    return int(first + first_whole + further)


def non_torch_bytes(request: PlanRequest) -> int:
    """Memory outside PyTorch: libraries, and with tensor parallelism the buffers of all-reduce."""
    return NON_TORCH_BYTES if request.tensor_parallel_size == 1 else NON_TORCH_PARALLEL_BYTES


def attention_workspace_bytes(request: PlanRequest, capability: tuple[int, int] | None) -> int:
    """The workspace of FlashInfer where vLLM chooses it (`platforms/cuda.py`): an fp8 cache without FlashAttention 3
    (which runs on 9.0), and all of Blackwell's data-center cards. Counted where the card is not known."""
    if capability is None or capability[0] == 10:
        return FLASHINFER_WORKSPACE_BYTES
    if request.kv_element_bytes == 1 and capability[0] != 9:
        return FLASHINFER_WORKSPACE_BYTES
    return 0


def slack_bytes(shape: ModelShape) -> int:
    """What PyTorch's allocator loses: large tensors get segments of whole 2 MiB, half of one lost on average; four
    fused layers a block, and 64 MiB for all that is small."""
    return (64 + 4 * shape.blocks) * MIB
