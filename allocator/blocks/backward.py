"""A decoder block run once, and gradients at its output taken back through it, probe by probe."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.blocks.finite import require_finite
from allocator.blocks.products import FastProducts
from allocator.blocks.stream import BlockStream

__all__ = ["BlockBackward", "Gradients"]


@dataclass(frozen=True)
class Gradients:
    """Of one probe: at the block's input `[B, T, D]`, and at inputs and outputs of linear modules `[B, T, K]`, of each
    what goes through that module alone."""

    at_states: Tensor
    at_inputs: dict[str, Tensor]
    at_outputs: dict[str, Tensor]


class BlockBackward:
    """states: `[B, T, D]`, no tensor of inference mode; inputs_of, outputs_of: names of linear modules of `block` at
    which gradients are wanted too; three_digits: whether that is enough, which is faster (see `blocks.products`)."""

    def __init__(
        self,
        stream: BlockStream,
        block: nn.Module,
        states: Tensor,
        inputs_of: Sequence[str] = (),
        outputs_of: Sequence[str] = (),
        three_digits: bool = False,
    ) -> None:
        self._where = f"gradients at the input of {stream.inventory.block_prefix(int(block.block_index))[:-1]}"  # type: ignore[arg-type]
        self._states = states.detach().requires_grad_(True)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        hooks = [block.get_submodule(name).register_forward_pre_hook(self._keep_input(name)) for name in inputs_of]
        hooks += [block.get_submodule(name).register_forward_hook(self._keep_output(name)) for name in outputs_of]
        try:
            with torch.inference_mode(False), torch.enable_grad(), FastProducts(three_digits):
                self._output = stream.run(block, self._states)
        finally:
            for hook in hooks:
                hook.remove()

    def pull(self, gradient: Tensor, last: bool) -> Gradients:
        """gradient: at the block's output `[B, T, D]`; last: whether no other follows. Raises InputError for gradients
        that are not finite."""
        points = [self._states, *self._inputs.values(), *self._outputs.values()]
        found = torch.autograd.grad(
            self._output, points, gradient, retain_graph=not last, allow_unused=True, materialize_grads=True
        )
        require_finite(found[0], self._where)
        inputs, outputs = found[1 : 1 + len(self._inputs)], found[1 + len(self._inputs) :]
        return Gradients(
            found[0], dict(zip(self._inputs, inputs, strict=True)), dict(zip(self._outputs, outputs, strict=True))
        )

    def _keep_input(self, name: str):  # type: ignore[no-untyped-def]
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            own = inputs[0].view_as(inputs[0])  # a tensor that only this module is given
            self._inputs[name] = own
            return (own, *inputs[1:])

        return keep

    def _keep_output(self, name: str):  # type: ignore[no-untyped-def]
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[name] = output

        return keep
