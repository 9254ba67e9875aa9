"""A decoder block of transformers made to have the names of its checkpoint: experts one by one, and old module names.

transformers 5 keeps the experts of a block as two fused tensors and calls every feed-forward part `mlp`; checkpoints
have one tensor an expert and matrix, and Mixtral's says `block_sparse_moe`. Candidates are of checkpoint tensors, so
the block is rebuilt to have those as parameters, and computes the same.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allocator.contract.modules import Rows

__all__ = ["Experts", "RowBlocks", "as_stored", "cut_rows", "name_as_stored"]

_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("up_proj", "down_proj"))
"""Gate, up and down, or without a gate (Nemotron-H)."""
_FUSED_NAME = "gate_up_proj"


def as_stored(layer: nn.Module, stored: Collection[str]) -> nn.Module:
    """`layer` (on the meta device; it is changed) with parameters named as `stored`: tensor names inside the block."""
    mlp = getattr(layer, "mlp", None)
    if mlp is not None and any(name.startswith("block_sparse_moe.") for name in stored):
        _rename_mlp(layer, "block_sparse_moe")
    for name, module in list(layer.named_modules()):
        of_experts = [n.removeprefix(f"{name}.0.") for n in stored if n.startswith(f"{name}.0.")]
        stacks = dict(module.named_parameters()).keys() if name.endswith("experts") and of_experts else ()
        if "gate_up_proj" in stacks or "up_proj" in stacks:
            parent, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(parent), attribute, _experts(module, of_experts))
    return layer


def _experts(fused: Any, of_experts: Collection[str]) -> "Experts":
    if f"{_FUSED_NAME}.weight" in of_experts:
        return BiasedExperts(fused)
    count, hidden, wide = fused.down_proj.shape
    names = next(n for n in _EXPERT_NAMES if f"{n[0]}.weight" in of_experts)
    return Experts(_Expert(fused.act_fn, names, hidden, wide, fused.down_proj.device) for _ in range(count))


def name_as_stored(layer: nn.Module, name: str, stored: str) -> None:
    """Let module `name` of `layer` be found under its checkpoint's name too: Laguna's `mlp.shared_expert.up_proj` is
    `mlp.shared_experts.up_proj` in transformers. Nothing is done where more than one part of the name differs."""
    own, other = name.split("."), stored.split(".")
    differing = [number for number, parts in enumerate(zip(own, other, strict=False)) if parts[0] != parts[1]]
    if len(own) != len(other) or len(differing) != 1:
        return
    above, alias = own[: differing[0]], other[differing[0]]
    parent = layer.get_submodule(".".join(above))
    if not hasattr(parent, alias):
        parent.add_module(alias, parent.get_submodule(own[differing[0]]))


def cut_rows(model: nn.Module, rows: Mapping[str, Sequence[Rows]]) -> None:
    """Put `RowBlocks` in the place of the modules of `model` that are cut (in place): those, by name, of whose `rows`
    several modules are made."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and len(rows.get(name, ())) > 1:
            model.set_submodule(name, RowBlocks(module, rows[name]))


class RowBlocks(nn.Module):
    """A linear module in modules `rows.0`, `rows.1`, ...: each has some of its output rows, `places`.

    All of them have as many runs, and a run of one stands beside those of the others. `linear` gives sizes, dtype and
    device; its weight is not taken over.
    """

    def __init__(self, linear: nn.Linear, places: Sequence[Rows]) -> None:
        super().__init__()
        weight = linear.weight
        self.places = places
        self.rows = nn.ModuleList(
            nn.Linear(linear.in_features, len(rows), bias=False, device=weight.device, dtype=weight.dtype)
            for rows in places
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        runs = self.places[0].runs
        return torch.cat([block(x).unflatten(-1, (runs, -1)) for block in self.rows], -1).flatten(-2)


def _rename_mlp(layer: nn.Module, name: str) -> None:
    """Move `layer.mlp` to `name`; the layer's forward, which says `self.mlp`, finds it through a property."""
    layer.add_module(name, layer.get_submodule("mlp"))
    del layer.mlp
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (kind,), {"mlp": property(lambda self: getattr(self, name))})


class Experts(nn.ModuleList):
    """The experts of a block, each with its linear modules. An expert runs on the tokens that chose it, if any."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden `[n, D]`; chosen, weights `[n, top_k]`: the experts of each token and what their outputs weigh."""
        total = torch.zeros_like(hidden)
        for number in torch.unique(chosen).tolist():
            tokens, place = torch.where(chosen == number)
            output = self[number](hidden[tokens]) * weights[tokens, place, None]
            total = total.index_add(0, tokens, output.to(total.dtype))
        return total


class _Expert(nn.Module):
    """One feed-forward network; of three names it is gated."""

    def __init__(self, activation: Any, names: tuple[str, ...], hidden: int, wide: int, device: torch.device) -> None:
        super().__init__()
        self._activation, self._names = activation, names
        for name in names:
            shape = (wide, hidden) if name == names[-1] else (hidden, wide)
            self.add_module(name, nn.Linear(*shape, bias=False, device=device))

    def forward(self, x: Tensor) -> Tensor:
        *gates, up, down = (self.get_submodule(name) for name in self._names)
        states = self._activation(gates[0](x)) * up(x) if gates else self._activation(up(x))
        output: Tensor = down(states)
        return output


class BiasedExperts(Experts):
    """Experts with biases, which the files have in one tensor for all of them, and gate and up in one module (gpt-oss).

    `fused` gives sizes, device and the activation; its weights are not taken over.
    """

    def __init__(self, fused: Any) -> None:
        count, wide, hidden = fused.down_proj.shape
        device = fused.down_proj.device
        super().__init__()
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            shape = getattr(fused, name).shape
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device), requires_grad=False))
        for number in range(count):
            self.append(_BiasedExpert(self, number, fused._apply_gate, hidden, wide, device))


class _BiasedExpert(nn.Module):
    """Expert `number` of `of`, which has its biases."""

    def __init__(
        self, of: BiasedExperts, number: int, activation: Any, hidden: int, wide: int, device: torch.device
    ) -> None:
        super().__init__()
        self._of, self._number, self._activation = (of,), number, activation  # a tuple, so that `of` is no part of it
        self.gate_up_proj = nn.Linear(hidden, 2 * wide, bias=False, device=device)
        self.down_proj = nn.Linear(wide, hidden, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        biases = self._of[0]
        hidden = self._activation(self.gate_up_proj(x) + biases.get_parameter("gate_up_proj_bias")[self._number])
        output: Tensor = self.down_proj(hidden) + biases.get_parameter("down_proj_bias")[self._number]
        return output
