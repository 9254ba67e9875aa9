"""Linear layers whose shards have different widths: 2-8 and 16 bits, symmetric and not, side by side."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase

from allocator.contract.errors import ContractError
from allocator.contract.layout import Dtype16
from gamma_vllm.compatibility import layer_prefix
from gamma_vllm.kernels.base import Kernel
from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.parameters import FlatParameter, join_zero_points
from gamma_vllm.shards import PARTS, CheckpointModule, LayerGeometry, Segment, Shard, merge, plan_shards, windows

__all__ = [
    "GammaLinearMethod",
    "check_loaded",
    "checkpoint_tensors",
    "expects_load",
    "held_tensors",
    "key_compile_cache",
    "layer_geometry",
    "parameter_name",
    "part_dtypes",
    "register_held",
]

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}

_WITHOUT_CHECKPOINT = ("dummy", "sharded_state", "runai_streamer_sharded")
"""Load formats that never hand checkpoint tensors to the weight loaders."""


class GammaLinearMethod(LinearMethodBase):
    """Creates, loads and multiplies one layer. Each layer has its own object.

    Life of a layer: flat parameters (`gamma_vllm.parameters`) take the checkpoint's tensors; after loading
    they are cut into segments of one kind, and each segment's tensors become what the kernel wants, as
    parameters `gamma_<segment>_<name>`. `weight_packed` stays as an empty tensor: LoRA asks for its device.

    The parameters bring their own weight loader, so the class needs no place in vLLM's list for loader v2.
    """

    def __init__(self, modules: list[CheckpointModule], checkpoint_dtype: Dtype16):
        self.modules = modules
        self.checkpoint_dtype = checkpoint_dtype
        self.kernel: Kernel
        self.segments: list[Segment] = []
        self.expects_load = True

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the flat parameters. Raises ContractError when the config contradicts the layer."""
        geometry = layer_geometry(layer, input_size_per_partition, output_partition_sizes, input_size, output_size)
        self._register(layer, plan_shards(self.modules, geometry), geometry.prefix, params_dtype)

    def _register(self, layer: nn.Module, shards: list[Shard], prefix: str, params_dtype: torch.dtype) -> None:
        self.kernel = choose_kernel(torch.get_default_device())
        self.segments = merge(shards)
        self.expects_load = expects_load()
        config = get_current_vllm_config_or_none()
        if config is not None:
            key_compile_cache(config, self.kernel)
        dtypes = part_dtypes(self.checkpoint_dtype, params_dtype)
        for part in PARTS:
            table = windows(shards, part)
            if table:
                layer.register_parameter(part, FlatParameter.empty(part, table, dtypes[part], prefix))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Cut the flat parameters into segments and let the kernel pack them.

        Raises ContractError naming every checkpoint tensor that was not loaded.
        """
        found = {part: getattr(layer, part, None) for part in PARTS}
        flat = {part: value for part, value in found.items() if isinstance(value, FlatParameter)}
        if not flat:
            return  # already in the kernel's form
        check_loaded(list(flat.values()), self.expects_load)
        device = next(iter(flat.values())).device
        for part in flat:
            delattr(layer, part)
        for number, segment in enumerate(self.segments):
            self._keep(layer, number, segment, checkpoint_tensors(segment, flat))
        empty = torch.empty(0, dtype=torch.int32, device=device)
        layer.register_parameter("weight_packed", nn.Parameter(empty, requires_grad=False))

    def _keep(self, layer: nn.Module, number: int, segment: Segment, tensors: dict[str, Tensor]) -> None:
        """Register what `apply` reads of one segment, given the checkpoint's tensors."""
        if segment.quantized:
            tensors = self.kernel.pack(segment, tensors)
        for name, tensor in tensors.items():
            register_held(layer, self.kernel, name, parameter_name(number, name), tensor)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., in_features]` to `[..., out_features]` of this rank, in the dtype of `x`."""
        output = self.kernel.layer(self.segments, self.held(layer), x)
        return output if bias is None else output.add_(bias)

    def held(self, layer: nn.Module) -> list[dict[str, Tensor]]:
        """What the kernel multiplies with, segment by segment."""
        return [
            {name: getattr(layer, parameter_name(i, name)) for name in held_tensors(self.kernel, segment)}
            for i, segment in enumerate(self.segments)
        ]


def register_held(layer: nn.Module, kernel: Kernel, name: str, registered: str, tensor: Tensor) -> None:
    """Register what the kernel calls `name` under the name `registered`: as a parameter, or work space as a buffer."""
    if name in kernel.buffers:
        layer.register_buffer(registered, tensor, persistent=False)
    else:
        layer.register_parameter(registered, nn.Parameter(tensor, requires_grad=False))


def held_tensors(kernel: Kernel, segment: Segment) -> tuple[str, ...]:
    """The names of the tensors that multiplying with a segment takes."""
    return kernel.tensor_names(segment) if segment.quantized else ("weight",)


def expects_load() -> bool:
    """Whether the engine that is being made hands checkpoint tensors to the weight loaders."""
    config = get_current_vllm_config_or_none()
    return config is None or config.load_config.load_format not in _WITHOUT_CHECKPOINT


def check_loaded(parameters: list[FlatParameter], expected: bool) -> None:
    """Raises ContractError naming every checkpoint tensor that a layer did not get.

    Without a load that was `expected`, all may be missing, but not a part of them.
    """
    if not expected and not any(p.loaded for p in parameters):
        return
    missing = [name for p in parameters for name in p.missing()]
    if missing:
        raise ContractError(
            f"layer {parameters[0].prefix}: the checkpoint has no {', '.join(missing)}; "
            "the file is incomplete or was exported for another architecture"
        )


def part_dtypes(checkpoint_dtype: Dtype16, params_dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which each tensor of a module is loaded.

    Scales keep the checkpoint's: float16 would lose what bfloat16 can hold.
    """
    dtypes = {"weight_scale": _TORCH_DTYPES[checkpoint_dtype], "weight_shape": torch.int64, "weight": params_dtype}
    return dict.fromkeys(PARTS, torch.int32) | dtypes


def key_compile_cache(config: VllmConfig, kernel: Kernel) -> None:
    """Make vLLM's cache of compiled graphs depend on the kernels, which it cannot see (widths are in its key).

    Otherwise an engine with other kernels would find the graph of the former.
    """
    if isinstance(config.additional_config, dict):
        config.additional_config["gamma"] = kernel.signature


def layer_geometry(
    layer: nn.Module,
    input_size_per_partition: int,
    output_partition_sizes: list[int],
    input_size: int,
    output_size: int,
) -> LayerGeometry:
    """What `create_weights` is told, together with the layer's tensor-parallel rank and KV head replicas."""
    copies = [1] * len(output_partition_sizes)
    replicas = getattr(layer, "num_kv_head_replicas", 1)
    if len(copies) == 3:
        copies = [1, replicas, replicas]
    elif replicas != 1:
        raise ContractError(
            f"layer {layer_prefix(layer)}: {replicas} copies of KV heads in a layer of {len(copies)} shards, "
            "which this release cannot place; use a smaller tensor_parallel_size"
        )
    return LayerGeometry(
        prefix=layer_prefix(layer),
        input_size=input_size,
        output_size=output_size,
        input_size_per_partition=input_size_per_partition,
        output_partition_sizes=tuple(output_partition_sizes),
        tp_rank=getattr(layer, "tp_rank", 0),
        tp_size=getattr(layer, "tp_size", 1),
        copies=tuple(copies),
    )


def parameter_name(number: int, name: str) -> str:
    """Name of the parameter that holds the kernel's tensor `name` of segment `number`."""
    return f"gamma_{number}_{name}"


def checkpoint_tensors(segment: Segment, flat: dict[str, FlatParameter]) -> dict[str, Tensor]:
    """The checkpoint tensors of one segment, shards joined along the rows: `weight`, or what a kernel packs."""
    if not segment.quantized:
        return {"weight": _rows(flat["weight"], segment)}
    tensors = {"packed": _rows(flat["weight_packed"], segment), "scale": _rows(flat["weight_scale"], segment)}
    if not segment.symmetric:
        zero_point = flat["weight_zero_point"]
        rows = [zero_point.table[i].shard.rows for i in segment.shards]
        parts = [zero_point.window(i) for i in segment.shards]
        tensors["zero_point"] = join_zero_points(parts, rows, segment.num_bits)
    return tensors


def _rows(parameter: FlatParameter, segment: Segment) -> Tensor:
    """Neighbouring windows are neighbouring rows: one view `[segment.rows, ...]`, no copy."""
    first = parameter.table[segment.shards[0]]
    width = first.shape[1]
    return parameter.data.narrow(0, first.offset, segment.rows * width).view(segment.rows, width)
