"""The embeddings that each block of Gemma's small models has of its own, as the code of transformers makes them."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BESIDE_BLOCKS", "PerLayerInputs"]

_TABLE, _PROJECTION, _NORM = "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"
BESIDE_BLOCKS = (_TABLE, _PROJECTION, _NORM)
"""Modules of the backbone that make them."""

ReadRows = Callable[[str, slice], Tensor]
"""Of the tensor `[rows, columns]` of a module's name: some rows, all columns."""


class PerLayerInputs:
    """`backbone` is the model of transformers around the blocks, on the meta device; `read` reads its tensors.

    The backbone makes those of all blocks at once, from a table of all of them side by side. Its code is run with the
    parts of one block, as if there were no other; the table stays in the file, of which a few rows are read.
    """

    def __init__(self, backbone: Any, read: ReadRows) -> None:
        self._backbone, self._read = backbone, read
        self._table: Tensor | None = None
        self._of: tuple[int, Any] | None = None

    @property
    def vocabulary(self) -> int:
        return int(self._backbone.get_submodule(_TABLE).num_embeddings)

    def of_block(self, index: int, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """`[B, T, P]` for token_ids `[B, T]` and the rows of the embedding, scaled, `[B, T, D]`."""
        if self._of is None or self._of[0] != index:
            with torch.inference_mode(False):
                self._of = index, self._cut(index, embedded.device)
        own = self._of[1]
        given = [token_ids, None][: len(inspect.signature(own.get_per_layer_inputs).parameters)]
        projected: Tensor = own.project_per_layer_inputs(embedded, own.get_per_layer_inputs(*given))
        return projected[:, :, 0]

    def _cut(self, index: int, device: torch.device) -> Any:
        """The backbone with nothing but what makes the embeddings of block `index`."""
        size, own = int(self._backbone.hidden_size_per_layer_input), copy.copy(self._backbone)
        columns = slice(index * size, (index + 1) * size)
        if self._table is None:
            self._table = self._read(_TABLE, slice(None))
        scale = float(self._backbone.get_submodule(_TABLE).scalar_embed_scale)
        projection = nn.Linear(1, 1, bias=False, device="meta")
        projection.weight = nn.Parameter(self._read(_PROJECTION, columns).float().to(device), requires_grad=False)
        norm = copy.deepcopy(self._backbone.get_submodule(_NORM))
        weight = self._read(_NORM, slice(None)).float().to(device)
        norm.load_state_dict(dict.fromkeys(norm.state_dict(), weight), assign=True)
        own._modules = {_TABLE: _Rows(self._table[:, columns], scale), _PROJECTION: projection, _NORM: norm}
        own.config = copy.copy(self._backbone.config)
        own.config.num_hidden_layers = 1
        return own.requires_grad_(False)


class _Rows(nn.Module):
    """An embedding whose rows are read where they lie, and then scaled."""

    def __init__(self, table: Tensor, scale: float) -> None:
        super().__init__()
        self._table, self._scale = (table,), scale  # a tuple, so that it is no part of the module

    def forward(self, token_ids: Tensor) -> Tensor:
        table = self._table[0]
        rows = nn.functional.embedding(token_ids.to(table.device), table)
        return rows.to(token_ids.device).float() * self._scale
