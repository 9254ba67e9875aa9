"""What some blocks need of a token beside its hidden state, in columns behind it: so each block still goes from the
states before it to those after it, and gradients find every way that an error takes.

Gemma's small models give each block an embedding of its own (`hidden_size_per_layer_input`), made of the token and of
its row of the embedding, and their last blocks attend to keys and values of earlier ones (`num_kv_shared_layers`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.model import Inventory
from allocator.model.architectures import architecture_of

__all__ = ["SharedKeys", "SideStates", "state_width"]


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values that block `block` hands on to later blocks of its `kind`: of `heads` heads each."""

    kind: str
    block: int
    heads: int
    key_size: int
    value_size: int

    @property
    def width(self) -> int:
        return self.heads * (self.key_size + self.value_size)


@dataclass(frozen=True)
class SideStates:
    """The columns of states `[B, T, W]`: `hidden_size` of the hidden state; as many of the row of the embedding, where
    blocks have embeddings of their own (`by_token`); those of `shared`; and, `by_token`, the number of the token."""

    hidden_size: int
    by_token: bool
    shared: tuple[SharedKeys, ...]

    @classmethod
    def of(cls, inventory: Inventory) -> "SideStates":
        """Raises InputError for blocks that would share keys which no block has."""
        config, layers = inventory.language, inventory.shape.attention
        rules = architecture_of(inventory.config)[1]
        first = inventory.blocks - sum(rules.shares_keys(inventory.blocks, config))
        kinds = rules.kinds(inventory.blocks, config)
        shared = []
        for kind in sorted({str(kind) for kind in kinds[first:]}):
            block = max((i for i in range(first) if kinds[i] == kind), default=None)
            if block is None:
                raise InputError(f"config.json: num_kv_shared_layers leaves no block of {kind} that has keys")
            layer = layers[block]
            shared.append(SharedKeys(kind, block, layer.kv_heads, layer.key_size, layer.value_size))
        by_token = rules.has("hidden_size_per_layer_input", config)
        return cls(inventory.shape.hidden_size, by_token, tuple(shared))

    @property
    def width(self) -> int:
        """W."""
        own = self.hidden_size if not self.by_token else 2 * self.hidden_size + 1
        return own + sum(keys.width for keys in self.shared)

    def begin(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """States `[B, T, W]` of hidden states `[B, T, D]` before the first block. What blocks are to fill is zero."""
        if self.width == self.hidden_size:
            return hidden
        states = hidden.new_zeros(*hidden.shape[:2], self.width - self.hidden_size)
        if self.by_token:
            states[..., -1] = token_ids  # exact: there are fewer tokens than float32 has whole numbers
        return torch.cat([hidden, states], -1)

    def hidden(self, states: Tensor) -> Tensor:
        """`[B, T, D]`."""
        return states[..., : self.hidden_size] if self.width != self.hidden_size else states

    def tokens(self, states: Tensor, vocabulary: int) -> Tensor:
        """The numbers of the tokens, int64 `[B, T]`."""
        return states[..., -1].detach().round().to(torch.int64).clamp(0, vocabulary - 1)

    def embedded(self, states: Tensor, index: int) -> Tensor:
        """The rows of the embedding `[B, T, D]`, of states before block `index`: those before the first are them."""
        first = 0 if index == 0 else self.hidden_size
        return states[..., first : first + self.hidden_size]

    def keys(self, states: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By kind of block, keys and values `[B, heads, T, size]`."""
        found, start = {}, self.hidden_size * (2 if self.by_token else 1)
        for of in self.shared:
            middle, end = start + of.heads * of.key_size, start + of.width
            key, value = (
                part.view(*part.shape[:-1], of.heads, -1).transpose(1, 2)
                for part in (states[..., start:middle], states[..., middle:end])
            )
            found[of.kind], start = (key, value), end
        return found

    def after(
        self, states: Tensor, index: int, hidden: Tensor, keys: Mapping[str, tuple[Tensor, Tensor]] | None
    ) -> Tensor:
        """States after block `index`, of those before it: `hidden` and `keys` are what the block has made of them."""
        parts = [hidden] if not self.by_token else [hidden, self.embedded(states, index)]
        for of in self.shared:
            assert keys is not None
            parts += [part.transpose(1, 2).flatten(2) for part in keys[of.kind]]
        return torch.cat([*parts, states[..., -1:]] if self.by_token else parts, -1)


def state_width(inventory: Inventory) -> int:
    """Numbers of a token's state between blocks."""
    return SideStates.of(inventory).width
