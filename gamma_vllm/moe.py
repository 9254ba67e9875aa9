"""Mixture-of-experts layers: every expert's gate, up and down projection at a width of its own.

vLLM keeps the experts of a layer in two tensors, `w13` (gate and up) and `w2` (down). Here each of the two is a set of
flat parameters (`gamma_vllm.parameters`) with a window for every expert. The experts that got tokens are multiplied
together where the kernel can (`Kernel.experts`), else one after the other with the kernel of linear layers; different
widths cost nothing extra. Routing, shared experts and the sum over ranks stay with vLLM; tensor parallelism cuts each
expert, expert parallelism deals them out.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.utils import set_weight_attrs

from allocator.contract.errors import ContractError
from allocator.contract.layout import Dtype16, module_tensors
from allocator.contract.resident import EXPERT_ALIGNMENT_BYTES
from gamma_vllm.kernels.base import Activation, Kernel, Place, Stack, define, kinds_of
from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.linear import (
    check_loaded,
    checkpoint_tensors,
    expects_load,
    held_tensors,
    key_compile_cache,
    part_dtypes,
    register_held,
)
from gamma_vllm.memory import empty_weight
from gamma_vllm.parameters import FlatParameter
from gamma_vllm.shards import PARTS, CheckpointModule, LayerGeometry, Segment, Shard, merge, plan_shards, windows

__all__ = ["ExpertModules", "GammaMoEMethod"]

_SWIGLUOAI_ALPHA, _SWIGLUOAI_LIMIT = 1.702, 7.0


@dataclass(frozen=True)
class ExpertModules:
    """The checkpoint's modules of one expert: gate and up (`w13`, one when the activation has no gate, or when it takes
    their rows in turns, as gpt-oss's does), and down."""

    w13: tuple[CheckpointModule, ...]
    w2: CheckpointModule


@dataclass
class _Stack:
    """One of the two weights of the layer: per local expert its segments, where their tensors lie, and what the kernel
    made of that."""

    name: str
    segments: list[list[Segment]]
    places: dict[tuple[int, int, str], Place]
    tensors: tuple[str, ...] = ()
    index: Any = None

    def held(self, layer: RoutedExperts) -> Stack:
        tensors = {name: getattr(layer, f"gamma_{self.name}_{name}") for name in self.tensors}
        return Stack(self.segments, tensors, self.places, self.index)


class GammaMoEMethod(FusedMoEMethodBase):
    """Creates, loads and multiplies the experts of one layer. `experts` are all of the model, in its order."""

    def __init__(self, layer: RoutedExperts, experts: Sequence[ExpertModules], checkpoint_dtype: Dtype16):
        super().__init__(layer.moe_config)
        self.experts = experts
        self.checkpoint_dtype = checkpoint_dtype
        self.kernel: Kernel
        self.stacks: list[_Stack] = []
        self.expects_load = True

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register flat parameters for the `num_experts` of this rank. Raises ContractError on a contradiction."""
        self.kernel = choose_kernel(torch.get_default_device())
        self.expects_load = expects_load()
        config = get_current_vllm_config_or_none()
        if config is not None:
            key_compile_cache(config, self.kernel)
        slots = {g: layer.expert_map_manager.map_global_to_local(g) for g in range(len(self.experts))}
        local = {slot: self.experts[g] for g, slot in slots.items() if slot != -1}
        if sorted(local) != list(range(num_experts)):
            raise ContractError(
                f"layer {layer.layer_name}: {num_experts} experts on this rank, the checkpoint's are {sorted(local)}"
            )
        size = intermediate_size_per_partition
        wide = size * (2 if self.moe.is_act_and_mul else 1) // len(self.experts[0].w13)
        w13 = [self._plan(layer, local[i].w13, hidden_size, wide, rows=True) for i in range(num_experts)]
        w2 = [self._plan(layer, (local[i].w2,), size, hidden_size, rows=False) for i in range(num_experts)]
        dtypes = part_dtypes(self.checkpoint_dtype, params_dtype)
        for name, shards_of_experts in (("w13", w13), ("w2", w2)):
            shards = [shard for shards in shards_of_experts for shard in shards]
            for part in PARTS:
                # vLLM asks every rank for a parameter for each tensor, also for those of experts of other ranks.
                if part in self._parts(name):
                    table = windows(shards, part)
                    parameter = FlatParameter.empty(part, table, dtypes[part], layer.layer_name, load_expert)
                    parameter.slots = {g: slot for g, slot in slots.items() if slot != -1}
                    parameter.shards_per_expert = len(shards_of_experts[0])
                    layer.register_parameter(f"{name}_{part}", parameter)
            self.stacks.append(_Stack(name, _segments(shards_of_experts), {}))
        for name, width in (("w13", wide * len(self.experts[0].w13)), ("w2", hidden_size)) if self.moe.has_bias else ():
            bias = torch.nn.Parameter(torch.zeros(num_experts, width, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(f"{name}_bias", bias)
            set_weight_attrs(bias, extra_weight_attrs)

    def _parts(self, stack: str) -> set[str]:
        """The tensors that any expert of the model has in a stack."""
        modules = [m for e in self.experts for m in (e.w13 if stack == "w13" else (e.w2,))]
        return {t.name[1:] for m in modules for t in module_tensors("", m.format, self.checkpoint_dtype)}

    def _plan(
        self, layer: RoutedExperts, modules: tuple[CheckpointModule, ...], columns: int, rows_each: int, *, rows: bool
    ) -> list[Shard]:
        """The shards of one expert: `rows` says whether tensor parallelism cuts its rows (w13) or its columns (w2)."""
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        geometry = LayerGeometry(
            prefix=layer.layer_name,
            input_size=columns if rows else columns * ranks,
            output_size=len(modules) * rows_each * (ranks if rows else 1),
            input_size_per_partition=columns,
            output_partition_sizes=(rows_each,) * len(modules),
            tp_rank=rank,
            tp_size=ranks,
            copies=(1,) * len(modules),
        )
        return plan_shards(modules, geometry)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Pack every segment for the kernel; raises ContractError naming every checkpoint tensor not loaded."""
        for stack in self.stacks:
            found = {part: getattr(layer, f"{stack.name}_{part}", None) for part in PARTS}
            flat = {part: value for part, value in found.items() if isinstance(value, FlatParameter)}
            if not flat:
                continue  # already in the kernel's form
            check_loaded(list(flat.values()), self.expects_load)
            for part in flat:
                delattr(layer, f"{stack.name}_{part}")
            packed: dict[str, dict[tuple[int, int, str], Tensor]] = {}
            for expert, segments in enumerate(stack.segments):
                for number, segment in enumerate(segments):
                    tensors = checkpoint_tensors(segment, flat)
                    if segment.quantized:
                        tensors = self.kernel.pack(segment, tensors)
                    for name, tensor in tensors.items():
                        packed.setdefault(name, {})[expert, number, name] = tensor
            del flat, found
            stack.places, stack.tensors = {}, tuple(packed)
            for name, tensors_of_experts in packed.items():
                joined, places = _join(name, _by_kind(stack.segments, tensors_of_experts))
                stack.places |= places
                register_held(layer, self.kernel, name, f"gamma_{stack.name}_{name}", joined)
            stack.index = self.kernel.index_experts(stack.held(layer))

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """`x` `[tokens, hidden_size]` to this rank's part of the routed sum, of the same shape and dtype."""
        if torch.compiler.is_compiling():
            return torch.ops.gamma.experts(x, topk_weights, topk_ids, layer.layer_name)
        return self.multiply(layer, x, topk_weights, topk_ids)

    def multiply(self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """What `apply` computes. A token's sum is taken in float32 in the order of its choices, whatever the batch."""
        ids = topk_ids
        if layer.expert_map is not None:  # -1 for the experts of other ranks
            ids = layer.expert_map[ids.to(torch.int64)]
        weights = topk_weights.to(torch.float32)
        if layer.apply_router_weight_on_input:
            x, weights = x * topk_weights.to(x.dtype), torch.ones_like(weights)
        w13, w2 = (stack.held(layer) for stack in self.stacks)
        silu = layer.activation is MoEActivation.SILU and layer.swiglu_limit is None
        activation = Activation(functools.partial(self._activate, layer), silu)
        # Kernels for all experts at once have no biases.
        together = None if self.moe.has_bias else self.kernel.experts(w13, w2, x, ids, weights, activation)
        if together is not None:
            return together
        ids = ids.to(torch.int64)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.multiply_all(layer, x, weights, ids)
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten() + 1, minlength=len(w13.segments) + 1).tolist()
        order = order[counts[0] :]  # (token, choice) pairs, those of one expert next to each other
        rows, products, start = x[order // ids.shape[1]], [], 0
        for expert, count in enumerate(counts[1:]):
            if count:
                products.append(self._expert(layer, w13, w2, expert, rows[start : start + count]))
                start += count
        chosen = torch.zeros(ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)
        if products:
            chosen[order] = torch.cat(products).to(torch.float32)
        return (chosen.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def multiply_all(self, layer: RoutedExperts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """`multiply` for a captured graph, which cannot depend on where tokens go: every expert sees every token.

        weights: float32, ids: int64 numbers of local experts.
        """
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        w13, w2 = (stack.held(layer) for stack in self.stacks)
        for expert in range(len(w13.segments)):
            share = (weights * (ids == expert)).sum(-1, keepdim=True)
            output += self._expert(layer, w13, w2, expert, x).to(torch.float32) * share
        return output.to(x.dtype)

    def _expert(self, layer: RoutedExperts, w13: Stack, w2: Stack, expert: int, x: Tensor) -> Tensor:
        if not self.moe.has_bias:
            return self._product(w2, expert, self._activate(layer, self._product(w13, expert, x)))
        hidden = self._activate(layer, self._product(w13, expert, x) + layer.w13_bias[expert])
        return self._product(w2, expert, hidden) + layer.w2_bias[expert]

    def _activate(self, layer: RoutedExperts, hidden: Tensor) -> Tensor:
        if layer.activation is MoEActivation.SWIGLUOAI and not hidden.is_cuda:
            return _swigluoai(hidden)  # vLLM's CPU build has no operator for it alone
        columns = hidden.shape[1] // 2 if self.moe.is_act_and_mul else hidden.shape[1]
        activated = torch.empty(hidden.shape[0], columns, dtype=hidden.dtype, device=hidden.device)
        apply_moe_activation(layer.activation, activated, hidden, activation_config=_activation_config(layer))
        return activated

    def _product(self, stack: Stack, expert: int, x: Tensor) -> Tensor:
        segments = stack.segments[expert]
        held = [
            {name: stack.of(expert, number, name) for name in held_tensors(self.kernel, segment)}
            for number, segment in enumerate(segments)
        ]
        return self.kernel.layer(segments, held, x)


def load_expert(
    param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
) -> bool | None:
    """The weight loader of the experts' flat parameters. vLLM needs the name `param` for the first argument.

    `shard_id`: w1 (gate), w3 (up) or w2 (down). `expert_id` is the expert's number in the model; False is returned
    for one that another rank holds.
    """
    slot = param.slots.get(expert_id)
    if slot is not None:
        param.load_shard(slot * param.shards_per_expert + (shard_id == "w3"), loaded_weight)
    return slot is not None if return_success else None


def _segments(shards_of_experts: list[list[Shard]]) -> list[list[Segment]]:
    """Each expert's segments; their shard indices count through all experts, as those of the flat parameters do."""
    start, result = 0, []
    for shards in shards_of_experts:
        result.append([replace(s, shards=tuple(start + i for i in s.shards)) for s in merge(shards)])
        start += len(shards)
    return result


def _by_kind(
    segments: list[list[Segment]], tensors: dict[tuple[int, int, str], Tensor]
) -> dict[tuple[int, int, str], Tensor]:
    """Those of one kind at one place in their experts next to each other, so that a kernel can take them together."""

    def kind(key: tuple[int, int, str]) -> tuple[list[int], int, int]:
        expert, number, _name = key
        of_expert = segments[expert]
        return kinds_of([of_expert[number]]), sum(segment.rows for segment in of_expert[:number]), expert

    return {key: tensors[key] for key in sorted(tensors, key=kind)}


def _join(name: str, tensors: dict[tuple[int, int, str], Tensor]) -> tuple[Tensor, dict[tuple[int, int, str], Place]]:
    """One 1-D tensor of all `tensors` of a name, each aligned as one of its own would be, and the place of each."""
    first = next(iter(tensors.values()))
    step = EXPERT_ALIGNMENT_BYTES // first.element_size()
    places, end = {}, 0
    for key, tensor in tensors.items():
        places[key] = Place(end, tuple(tensor.shape))
        end += -(-tensor.numel() // step) * step
    with torch.device(first.device):
        joined = empty_weight(name, end, first.dtype).zero_()
    for key, tensor in tensors.items():
        joined.narrow(0, places[key].offset, tensor.numel()).copy_(tensor.reshape(-1))
    return joined, places


def _swigluoai(hidden: Tensor) -> Tensor:
    """gpt-oss's activation of gate and up in turns, `[n, 2 * size]` to `[n, size]`, as vLLM's `SwigluOAIAndMul`."""
    gate, up = hidden[:, ::2].clamp(max=_SWIGLUOAI_LIMIT), hidden[:, 1::2].clamp(-_SWIGLUOAI_LIMIT, _SWIGLUOAI_LIMIT)
    return (up + 1) * gate * torch.sigmoid(_SWIGLUOAI_ALPHA * gate)


def _activation_config(layer: RoutedExperts) -> ApplyMoEActivationConfig:
    moe = layer.moe_config
    return ApplyMoEActivationConfig(
        clamp_limit=layer.swiglu_limit,
        alpha=1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha,
        beta=0.0 if layer.swiglu_beta is None else layer.swiglu_beta,
        activation_situ_beta=moe.activation_situ_beta,
        activation_situ_linear_beta=moe.activation_situ_linear_beta,
    )


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """`GammaMoEMethod.multiply` of the layer of that name, as vLLM's own operators for experts find theirs."""
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.quant_method.multiply(layer, x, topk_weights, topk_ids)


def _fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


define("experts", "(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor", _experts, _fake)
