"""Custom operators of the plugin: opaque to torch.compile, under a namespace of their own."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["define"]

_LIBRARY = torch.library.Library("gamma", "FRAGMENT")


def define(name: str, schema: str, implementation: Callable[..., Tensor] | None, fake: Callable[..., Tensor]) -> None:
    """Register operator `torch.ops.gamma.<name>`, whose implementation may come from elsewhere; nothing happens when it
    is already there.

    `torch.ops.vllm` is shared by all plugins, where equal names collide; hence the namespace.
    """
    if hasattr(torch.ops.gamma, name):
        return
    _LIBRARY.define(name + schema)
    if implementation is not None:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gamma::{name}", fake, lib=_LIBRARY)
