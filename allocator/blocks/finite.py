"""Numbers that are not finite are refused where they first arise: what is computed from them is worth nothing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allocator.contract.errors import InputError

__all__ = ["ADVICE", "first_not_finite", "require_finite"]

ADVICE = (
    "the weights themselves are finite, so the model computes it: see whether it writes text at all in float32 with "
    "transformers, and download, convert or merge it again"
)


def require_finite(tensor: Tensor, what: str, advice: str = ADVICE) -> None:
    """Raises InputError that names `what` if a number of `tensor` is NaN or infinite."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        wrong = tensor[~finite]
        kind = "NaN" if bool(wrong.isnan().any()) else "infinity"
        raise InputError(f"{what}: {wrong.numel()} of {tensor.numel()} numbers are not finite ({kind}); {advice}")


def first_not_finite(block: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the module of `block` whose output is the first that is not finite while `run()`, None if none is."""
    found: list[str] = []

    def see(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(see(name)) for name, module in block.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
