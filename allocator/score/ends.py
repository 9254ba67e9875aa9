"""Linear modules behind which a block need not be run again, because gradients say what an error there does."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.blocks.structure import Experts

__all__ = ["Ends", "few_tokens", "find_ends"]

_FEW_TOKENS = 8


@dataclass(frozen=True)
class Ends:
    """Modules by their names in the block, with their weights.

    additive: their output is added to the block's and does nothing else, so that the gradient there is that of the
    block's output itself, whatever the error. nearly_linear: what follows them, other modules among it, is done to each
    token alone, so that an error there is known by its gradient as far as it is small. A block with experts has none
    of these: a small error may send a token elsewhere.
    """

    additive: Mapping[str, Tensor]
    nearly_linear: Mapping[str, Tensor]

    def within(self, numbers: int) -> "Ends":
        """As many as have no more than `numbers` features to keep gradients of, the additive ones first."""
        additive, nearly_linear = dict(self.additive), dict(self.nearly_linear)
        if sum(weight.shape[1] for weight in additive.values()) > numbers:
            additive = {}
        left = numbers - sum(weight.shape[1] for weight in additive.values())
        if sum(sum(weight.shape) for weight in nearly_linear.values()) > left:
            nearly_linear = {}
        return Ends(additive, nearly_linear)


def few_tokens(stream: BlockStream) -> Tensor:
    """States, and gradients at what a block makes of them, to find out how it is built: random, `[2, 1, T, D]`."""
    shape = (2, 1, _FEW_TOKENS, stream.side_states.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(stream.device)


def find_ends(stream: BlockStream, block: nn.Module) -> Ends:
    """Those of `block`, found by running it with gradients on a few random tokens."""
    states, gradient = few_tokens(stream)
    outputs: dict[str, Tensor] = {}
    # Not what makes more of a product, as Llama 4's router does.
    linears = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }

    def keep(name: str, output: Tensor) -> None:
        if output.requires_grad:  # not what chooses among tokens, as the indexer of DeepSeek's sparse attention
            outputs[name] = output

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in linears.items()
    ]
    try:
        with torch.enable_grad():
            output = stream.run(block, states.requires_grad_(True))
    finally:
        for hook in hooks:
            hook.remove()

    def weights(names: list[str]) -> dict[str, Tensor]:
        return {name: block.get_parameter(f"{name}.weight") for name in names}

    of_last = torch.zeros_like(gradient)
    of_last[:, -1] = gradient[:, -1]
    points = [*outputs.values()]
    everywhere, there = (
        torch.autograd.grad(output, points, above, retain_graph=True, allow_unused=True)
        for above in (gradient, of_last)
    )
    same = [own is not None and torch.equal(own, gradient) for own in everywhere]
    additive = [name for name, is_same in zip(outputs, same, strict=True) if is_same]
    by_token = [name for name, own in zip(outputs, there, strict=True) if _is_by_token(own) and name not in additive]
    others = {name: out for name, out in outputs.items() if name not in additive}
    routed = any(isinstance(module, Experts) for module in block.modules())
    before = [] if routed else [name for name in by_token if _has_behind(name, others)]
    return Ends(weights([name for name in additive if linears[name].bias is None]), weights(before))


def _is_by_token(gradient: Tensor | None) -> bool:
    """gradient: `[1, T, N]`, of an output that is 0 but for the last token's."""
    if gradient is None or gradient.shape[:2] != (1, _FEW_TOKENS):
        return False
    return bool(gradient[:, -1].any()) and not gradient[:, :-1].any()


def _has_behind(name: str, outputs: Mapping[str, Tensor]) -> bool:
    """Whether the output of any other module depends on that of `name`."""
    sums = [output.sum() for other, output in outputs.items() if other != name and output.numel()]
    (own,) = torch.autograd.grad(sums, outputs[name], retain_graph=True, allow_unused=True)
    return own is not None
