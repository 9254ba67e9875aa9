"""Loads one decoder block's weights, runs it on hidden states, lets it go."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allocator.blocks.finite import first_not_finite, require_finite
from allocator.blocks.hf_model import build_skeleton, open_config
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.per_layer_inputs import PerLayerInputs
from allocator.blocks.side_states import SideStates
from allocator.blocks.skeleton import Skeleton
from allocator.blocks.structure import as_stored, cut_rows, name_as_stored
from allocator.blocks.tensors import read_rows, read_tensor
from allocator.contract.errors import InputError
from allocator.model import Inventory
from allocator.model.other_names import SCORE_NAME
from allocator.run.journal import Journal
from allocator.run.process_group import ALONE, ProcessGroup
from allocator.run.progress import Progress, silent

__all__ = ["HEAD_WEIGHT", "BlockStream", "InputObserver", "batches", "record_inputs", "state_step"]

InputObserver = Callable[[list[str], Tensor], None]
"""Called with the names of the linear modules that share an input, and that input `[B, T, K]`."""

HEAD_WEIGHT = "lm_head.weight"
"""The parameter of `BlockStream.head()` that holds the weight of the lm_head, also where the model has it tied."""
_BATCH_TOKENS = 4096


class BlockStream:
    """The source model in pieces: embedding, decoder blocks, final norm and head. Weights in float32.

    Only the structure of the whole model is built (on the meta device); `block(i)` materialises one block.
    States between blocks are `[B, T, W]`: hidden states `[B, T, D]` and, where blocks need any, `side_states` behind.
    """

    def __init__(self, inventory: Inventory, device: str | torch.device = "cpu") -> None:
        self.inventory = inventory
        self.device = torch.device(device)
        config = open_config(inventory.folder).get_text_config()
        self._skeleton = Skeleton(build_skeleton(inventory.folder, config), config, self.device)
        self._modules = {module.role: module.name for module in inventory.modules if module.block is None}
        self._stored = {t.name for t in (*(m.tensor for m in inventory.modules), *inventory.others)}
        self.side_states = SideStates.of(inventory)
        backbone = self._skeleton.backbone
        self._per_layer_inputs = PerLayerInputs(backbone, self._rows_beside) if self.side_states.by_token else None

    @property
    def blocks(self) -> int:
        return self.inventory.blocks

    def read(self, name: str) -> Tensor:
        """One source tensor as it is stored."""
        return read_tensor(self.inventory.tensor(name), self.device)

    def embed(self, token_ids: Tensor, table: Tensor | None = None) -> Tensor:
        """States before the first block; token_ids int64 `[B, T]`; `table` `[V, D]` in place of the model's rows."""
        if table is None:
            table = self.read(f"{self._modules['embedding']}.weight")
        token_ids = token_ids.to(self.device)
        return self.side_states.begin(self.embedded(token_ids, table), token_ids)

    def embedded(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows of `table` `[V, D]` as the first block takes them: `[..., D]`."""
        return nn.functional.embedding(token_ids.to(self.device), table).float() * self.embedding_scale

    @property
    def embedding_scale(self) -> float:
        """What the rows of the embedding are multiplied by: Gemma's and Granite's are, others' not."""
        return self._skeleton.embedding_scale

    @property
    def softcap(self) -> float | None:
        """What logits are squeezed to (Gemma 2)."""
        return self._skeleton.softcap

    def block(self, index: int) -> nn.Module:
        """Decoder block `index` with its weights, float32, in eval mode, without gradients."""
        prefix = self.inventory.block_prefix(index)
        stored = [name.removeprefix(prefix) for name in self._stored if name.startswith(prefix)]
        # On meta: structure without memory.
        layer = as_stored(copy.deepcopy(self._skeleton.blocks[index]), stored)
        parents = self.inventory.parents(index)
        cut_rows(layer, {name.removeprefix(prefix): [m.rows for m in of] for name, of in parents.items()})
        names = {name: self._skeleton.stored_as(index, name) for name in layer.state_dict()}
        state = {name: self.read(prefix + stored).float() for name, stored in names.items()}
        layer.load_state_dict(state, assign=True)
        layer.to(self.device)  # its tables
        for name, stored_name in names.items():
            name_as_stored(layer, name.rpartition(".")[0], stored_name.rpartition(".")[0])
        layer.block_index = index  # type: ignore[assignment]
        return layer.eval().requires_grad_(False)

    def run(self, block: nn.Module, states: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """The states after `block`, `[B, T, W]`, with `weights` (by parameter name) in place of its own."""
        index, side = self._index_of(block), self.side_states
        call = self._skeleton.call(index, *states.shape[:2])
        changes: dict[str, Any] = {"shared_kv_states": side.keys(states)} if side.shared else {}
        if self._per_layer_inputs is not None:
            tokens = side.tokens(states, self._per_layer_inputs.vocabulary)
            own = self._per_layer_inputs.of_block(index, tokens, side.embedded(states, index))
            changes["per_layer_input"] = own
        if changes:
            call = call.changed(block, changes)
        hidden = side.hidden(states)
        if weights is None:
            output = block(hidden, *call.arguments, **call.keywords)
        else:
            output = torch.func.functional_call(block, weights, (hidden, *call.arguments), call.keywords)
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return side.after(states, index, after, changes.get("shared_kv_states")) if changes else after

    def _index_of(self, block: nn.Module) -> int:
        index: Any = block.block_index
        return int(index)

    def fill_embeddings(self, hidden: HiddenStates, token_ids: Tensor, process_group: ProcessGroup = ALONE) -> None:
        """Write the states before block 0."""
        for _, batch in process_group.share(batches(token_ids.shape)):
            states = self.embed(token_ids[batch])
            require_finite(states, f"{self.inventory.folder}: the embedding's output")
            hidden.boundary(0)[batch] = states.cpu()
        self._settle(hidden, 0, process_group)

    def fill_block(
        self,
        hidden: HiddenStates,
        index: int,
        recorded: Sequence[str] = (),
        see: InputObserver | None = None,
        process_group: ProcessGroup = ALONE,
        block: nn.Module | None = None,
    ) -> None:
        """Write the states after block `index` from those before it; `see` is shown the inputs of `recorded`.

        With a process group, each process runs its own sequences and `see` is shown the inputs of those. `block`
        is that of `block(index)` where it is at hand.
        """
        block = self.block(index) if block is None else block
        with torch.inference_mode():
            for _, batch in process_group.share(batches(hidden.shape)):
                states = hidden.boundary(index)[batch].to(self.device)
                with record_inputs(block, recorded, see):
                    output = self.run(block, states)
                self._require_finite(output, block, states)
                hidden.boundary(index + 1)[batch] = output.cpu()
        self._settle(hidden, index + 1, process_group)

    def fill(
        self, hidden: HiddenStates, token_ids: Tensor, progress: Progress = silent, journal: Journal | None = None
    ) -> None:
        """Write the states of all boundaries that `journal` (its steps are boundaries) does not have."""
        journal = journal or Journal.nowhere()
        if journal.load(state_step(0)) is None:
            self.fill_embeddings(hidden, token_ids, journal.process_group)
            journal.save(state_step(0), True)
        progress.begin("teacher states", self.blocks, "block")
        for index in range(self.blocks):
            if journal.load(state_step(index + 1)) is not None:
                progress.skip()
                continue
            self.fill_block(hidden, index, process_group=journal.process_group)
            journal.save(state_step(index + 1), True)
            progress.advance()

    def _require_finite(self, output: Tensor, block: nn.Module, states: Tensor) -> None:
        """Raises InputError, with the first module of `block` that did not give finite numbers, if `output` has not."""
        if bool(torch.isfinite(output).all()):
            return
        prefix = self.inventory.block_prefix(self._index_of(block))
        module = first_not_finite(block, lambda: self.run(block, states))
        where = f"the output of {prefix}{module}" if module else f"the output of {prefix[:-1]}"
        require_finite(output, f"{self.inventory.folder}: {where}, and so of its block")

    def _settle(self, hidden: HiddenStates, index: int, process_group: ProcessGroup) -> None:
        process_group.wait()
        if process_group.leads:
            hidden.settle(index)

    def norm(self) -> nn.Module:
        """The final norm: from the states after the last block to the input of the lm_head, scaled as logits are."""
        norm: nn.Module = copy.deepcopy(self._skeleton.norm)
        name = f"{self._beside_blocks(self._skeleton.norm_name.rpartition('.')[2])}."
        norm.load_state_dict({part: self.read(name + part).float() for part in norm.state_dict()}, assign=True)
        parts = OrderedDict(norm=norm)
        if self.side_states.width != self.side_states.hidden_size:
            parts = OrderedDict(hidden=_Hidden(self.side_states), norm=norm)
        if self._skeleton.logit_scale != 1:
            parts["scale"] = _Scale(self._skeleton.logit_scale)
        whole = norm if len(parts) == 1 else nn.Sequential(parts)
        return whole.eval().requires_grad_(False)

    def _beside_blocks(self, leaf: str) -> str:
        """The name in the files of a module that stands beside the blocks."""
        beside = self.inventory.block_prefix(0).rpartition(".0.")[0].rpartition(".")[0]
        return f"{beside}.{leaf}" if beside else leaf

    def _rows_beside(self, leaf: str, rows: slice) -> Tensor:
        stored = self.inventory.tensor(f"{self._beside_blocks(leaf)}.weight")
        # Whole tensors are mapped into memory, where they are: what is not used of them takes none.
        return read_tensor(stored) if rows == slice(None) else read_rows(stored, rows)

    def head_weight(self) -> Tensor:
        """The weight of the lm_head, float32 `[V, D]`: that of the embedding in a tied model.

        Of a classifier that of its scores; a single one is that of yes against no, whose score is 0. Raises InputError
        for a model without either.
        """
        head = self.inventory.shape.head
        if head == "states":
            raise InputError(
                f"{self.inventory.folder}: {self.inventory.architecture} predicts nothing, so it has no KL divergence; "
                "`gamma learn`, `solve` and `export` do without"
            )
        if head == "scores":
            weight = self.read(f"{SCORE_NAME}.weight").float()
            return weight if len(weight) > 1 else torch.cat([torch.zeros_like(weight), weight])
        return self.read(f"{self._modules['embedding' if self.inventory.tied else 'lm_head']}.weight").float()

    def head(self) -> nn.Module:
        """Final norm and lm_head as one module from hidden states to float32 logits `[B, T, V]`.

        The parameter `HEAD_WEIGHT` of it is the lm_head's.
        """
        weight = self.head_weight()
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        parts = OrderedDict(norm=self.norm(), lm_head=head)
        if self.softcap is not None:
            parts["softcap"] = _Softcap(self.softcap)
        return nn.Sequential(parts).eval().requires_grad_(False)


class _Hidden(nn.Module):
    """The hidden states of states that have more behind them."""

    def __init__(self, side_states: SideStates) -> None:
        super().__init__()
        self._side_states = side_states

    def forward(self, states: Tensor) -> Tensor:
        return self._side_states.hidden(states)


class _Scale(nn.Module):
    """A number to multiply with: logits of Granite and Cohere, taken before the lm_head, which has no bias."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, states: Tensor) -> Tensor:
        return states * self._factor


class _Softcap(nn.Module):
    """Logits squeezed into -cap .. cap (Gemma 2)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self._cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return self._cap * torch.tanh(logits / self._cap)


@contextmanager
def record_inputs(block: nn.Module, names: Sequence[str], see: InputObserver | None) -> Iterator[None]:
    """Call `see(names_sharing, x)` for every distinct input x `[B, T, K]` of the block's linear modules `names`.

    Modules that are given the very same tensor (q/k/v, gate/up) are reported together.
    """
    seen: dict[int, tuple[Tensor, list[str]]] = {}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if see is not None:
        for tensor, sharing in seen.values():
            see(sharing, tensor)


def batches(shape: Sequence[int], tokens: int = _BATCH_TOKENS) -> list[slice]:
    """Slices of `[S, T, ...]` of about `tokens` tokens."""
    size = max(1, tokens // shape[1])
    return [slice(i, i + size) for i in range(0, shape[0], size)]


def state_step(index: int) -> str:
    """What the journal calls the step that wrote the states before block `index`."""
    return f"states-{index:04d}"
