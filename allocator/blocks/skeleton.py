"""How a model calls its decoder blocks, found by running its own code around stand-ins for them.

Every family has its own way: rotary tables by kind of layer, masks by window, scaled embeddings, logits that are scaled
or squeezed. None of it is written down here: the model of transformers is built without weights, its blocks are
replaced by modules that write down what they are given, and what happens to embeddings and logits is read off.
"""

import copy
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allocator.blocks.per_layer_inputs import BESIDE_BLOCKS
from allocator.contract.errors import InputError

__all__ = ["BlockCall", "Skeleton", "decoder_blocks"]

_SMALL, _LARGE = 2.0**-10, 1e9
"""Logits that show a scale, which a soft cap leaves alone, and the cap itself."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is given beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def changed(self, block: nn.Module, changes: Mapping[str, Any]) -> "BlockCall":
        """The call of `block` with other arguments, by their names."""
        names = list(inspect.signature(block.forward).parameters)[1 : 1 + len(self.arguments)]
        arguments = tuple(changes.get(name, own) for name, own in zip(names, self.arguments, strict=True))
        return BlockCall(arguments, self.keywords | {n: own for n, own in changes.items() if n not in names})


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder blocks: the outer ModuleList with the most parameters. Raises InputError."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise InputError(f"{type(model).__name__} of transformers has no list of decoder blocks")
    return max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))


class Skeleton:
    """A causal language model of transformers on the meta device, taken apart.

    `blocks` are its decoder blocks, `backbone` the module around them, `norm` the one after the last of them and
    `norm_name` its name. Rows of the
    embedding are multiplied by `embedding_scale`, logits by `logit_scale`; these `softcap` then squeezes, if it is not
    None. Raises InputError for a model that does something else to them.
    """

    def __init__(self, model: Any, config: Any, device: torch.device) -> None:
        self._architecture = type(model).__name__
        self._device, self._hidden_size = device, int(config.hidden_size)
        name, self.blocks = decoder_blocks(model)
        parent, _, self._leaf = name.rpartition(".")
        self.embedding_name = _name_of(model, model.get_input_embeddings())
        self.head_name = _name_of(model, model.get_output_embeddings())
        self._block_names = _stored_names(model, name)
        self.backbone: nn.Module = model.get_submodule(parent)
        self.norm_name = self._name_of_norm(model, parent)
        self.norm: nn.Module = model.get_submodule(self.norm_name)
        recorders = nn.ModuleList(_Recorder(block) for block in self.blocks)
        # Copied without the blocks: they are many.
        replaced = {id(self.blocks): recorders, id(self.norm): nn.Identity()}
        self._shell: Any = copy.deepcopy(model, replaced)
        self._backbone: Any = self._shell.get_submodule(parent)
        if hasattr(self._backbone, BESIDE_BLOCKS[0]):
            self._backbone.hidden_size_per_layer_input = 0  # made by `PerLayerInputs`
        self._recorders = recorders
        self._make_tables(config)
        self._find_answer()
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}
        self.embedding_scale = self._find_embedding_scale()
        self.logit_scale, self.softcap = self._find_logits()

    def call(self, index: int, batch: int, length: int) -> BlockCall:
        """How block `index` is called on hidden states `[batch, length, D]`."""
        key = (batch, length)
        if key not in self._calls:
            # Made once, and used with gradients too, which tensors of inference mode do not take.
            with torch.inference_mode(False):
                states = torch.zeros(batch, length, self._hidden_size, device=self._device)
                self._calls = {key: self._recorded(inputs_embeds=states)[0]}
        return self._calls[key][index]

    def stored_as(self, index: int, name: str) -> str:
        """What the files call the parameter `name` of block `index`, inside the block."""
        return self._block_names.get(f"{index}.{name}", name)

    @torch.no_grad()
    def _recorded(self, **inputs: Any) -> tuple[list[BlockCall], Tensor]:
        """The calls of all blocks, and what the first of them is given."""
        for recorder in self._recorders:
            recorder.seen = None  # type: ignore[assignment]
        self._backbone(**inputs, use_cache=False)
        calls: list[Any] = [recorder.seen for recorder in self._recorders]
        if None in calls:
            raise self._refused(f"its code does not run block {calls.index(None)} after the others")
        return [BlockCall(arguments, keywords) for _, arguments, keywords in calls], calls[0][0]

    def _name_of_norm(self, model: nn.Module, parent: str) -> str:
        """What is left of the backbone: everything else in it with parameters must be the norm after the blocks."""
        backbone = model.get_submodule(parent)
        known = {id(self.blocks), id(model.get_input_embeddings())}  # type: ignore[operator]
        children = [(n, m) for n, m in backbone.named_children() if n not in BESIDE_BLOCKS]
        rest = [n for n, m in children if id(m) not in known and _is_norm(n, m)]
        own = [n for n, _ in backbone.named_parameters(recurse=False)]
        if len(rest) != 1 or own:
            found = ", ".join([*rest, *own]) or "nothing"
            raise self._refused(f"beside embedding and blocks its code should have one norm, and has {found}")
        return f"{parent}.{rest[0]}" if parent else rest[0]

    def _make_tables(self, config: Any) -> None:
        """Rotary tables are computed in constructors, so they must not be made on meta."""
        for name, module in list(self._backbone.named_modules()):
            if not any(True for _ in module.parameters()) and any(b.is_meta for b in module.buffers(recurse=False)):
                try:
                    made = type(module)(config=getattr(module, "config", config))
                except TypeError:
                    raise self._refused(f"the tables of {name} cannot be made alone") from None
                self._backbone.set_submodule(name, made.to(self._device))

    @torch.no_grad()
    def _find_answer(self) -> None:
        """Whether the model's code takes the states out of a tuple that its blocks return, as older code does, or with
        something beside them."""
        states, seen = torch.zeros(1, 3, self._hidden_size, device=self._device), []
        norm = self._shell.get_submodule(self.norm_name)
        hook = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))
        for beside in (None, (), (None,)):
            seen.clear()
            for recorder in self._recorders:
                recorder.beside = beside  # type: ignore[assignment]
            # A tensor taken apart once a block is soon a number, and three rows are not two.
            with suppress(IndexError, ValueError):
                self._backbone(inputs_embeds=states, use_cache=False)
            if seen == [states.shape]:
                break
        hook.remove()

    @torch.no_grad()
    def _find_embedding_scale(self) -> float:
        embedding: Any = self._shell.get_submodule(self.embedding_name)
        for name, buffer in list(embedding.named_buffers()):
            if buffer.is_meta:  # the scale of Gemma's, which the module also has as a number
                embedding.register_buffer(name, torch.tensor(embedding.scalar_embed_scale, device=self._device))
        ids, rows = torch.zeros(1, 1, dtype=torch.int64, device=self._device), []
        for value in (0.0, 1.0):
            # A table of any size with one number behind it.
            table = torch.full((1, 1), value, device=self._device).expand(*embedding.weight.shape)
            embedding.weight = nn.Parameter(table, requires_grad=False)
            rows.append(self._recorded(input_ids=ids)[1].flatten())
        scale = float(rows[1][0])
        if rows[0].any() or (rows[1] != scale).any():
            raise self._refused("its code adds something to the rows of the embedding")
        return scale

    @torch.no_grad()
    def _find_logits(self) -> tuple[float, float | None]:
        """The scale of logits, before the lm_head too (MiniCPM 3), and what they are squeezed to after it (Gemma 2)."""
        head, normed = _GivenLogits(), torch.ones(1, 1, self._hidden_size, device=self._device)
        self._shell.set_submodule(self.head_name, head)
        states = torch.zeros(1, 1, self._hidden_size, device=self._device)
        self._shell.get_submodule(self.norm_name).register_forward_hook(lambda *_: normed)

        def logits(*given: float) -> Tensor:
            head.logits = torch.tensor([[given]], device=self._device)
            found: Tensor = self._shell(inputs_embeds=states, use_cache=False).logits[0, 0]
            return found

        small, large = (float(value) for value in logits(_SMALL, _LARGE))
        scale, softcap = small / _SMALL, None
        if large < 0.99 * scale * _LARGE:
            softcap, scale = large, round(scale, 4)  # the cap bends small ones a little
        given = torch.linspace(-50, 50, 11, device=self._device)
        expected = given * scale if softcap is None else softcap * torch.tanh(given * scale / softcap)
        if not torch.allclose(logits(*given.tolist()), expected, rtol=1e-5):
            raise self._refused("its code does more to logits than to scale and to squeeze them")
        before = float(head.states.flatten()[0])
        if head.states.shape != normed.shape or (head.states != before).any():
            raise self._refused("its code does more to the input of its lm_head than to scale it")
        return before * scale, softcap

    def _refused(self, what: str) -> InputError:
        return InputError(f"{self._architecture} of transformers cannot be run block by block: {what}")


class _Recorder(nn.Module):
    """Stands in for a decoder block: keeps what it is given, answers with the hidden states, in a tuple with `beside`
    if that is one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # no child: its parameters are not the recorder's
        self.seen: tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None = None
        self.beside: tuple[None, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        """What the model's code asks of its blocks, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor | None, ...]:
        self.seen = (hidden, arguments, keywords)
        return hidden if self.beside is None else (hidden, *self.beside)


class _GivenLogits(nn.Module):
    """Stands in for the lm_head, whose input it keeps."""

    logits: Tensor
    states: Tensor

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return self.logits


def _stored_names(model: Any, blocks: str) -> dict[str, str]:
    """Block number and name of each parameter of the blocks -> its name in the files, where that is another."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict(keep_vars=True)
    stored = {id(tensor): name for name, tensor in revert_weight_conversion(model, state).items()}
    found = {}
    for name, tensor in state.items():
        here, there = name.removeprefix(f"{blocks}."), stored.get(id(tensor), name)
        if name.startswith(f"{blocks}.") and not there.endswith(f".{here}"):
            found[here] = there.partition(f".{here.partition('.')[0]}.")[2]
    return found


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in name or name == "ln_f" or any(True for _ in module.parameters())


def _name_of(model: nn.Module, part: nn.Module | None) -> str:
    found: str | None = next((name for name, module in model.named_modules() if module is part), None)
    if found is None:
        raise InputError(f"{type(model).__name__} of transformers does not tell its embedding and its lm_head")
    return found
