"""The second half of tuning: the scales alone, through the whole model, against the original's predictions.

As EfficientQAT's E2E-QP (Chen et al. 2024), but by the KL divergence from the original instead of the text's loss, and
with one block in memory at a time: states go forward from block to block onto the disk, gradients come back the same
way. There is one scale for many weights, so that all of them, and what Adam keeps of each, stay in memory.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.products import half_products
from allocator.blocks.stream import HEAD_WEIGHT
from allocator.blocks.tensors import write_safetensors
from allocator.contract.bank import BANK_NAME, Bank, BankModule
from allocator.contract.digest import digest_file
from allocator.contract.layout import ModuleFormat
from allocator.quantize.bank_reader import BankReader
from allocator.quantize.quantizer import QuantizedModule
from allocator.run.journal import Journal

__all__ = ["SCALES_STEP", "tune_scales"]

_LOG = logging.getLogger(__name__)

SCALES_STEP = "scales through the model"

_BATCH = 32
"""Sequences a step."""
_RATE = 0.001
"""Of the logarithm of a scale, falling to zero."""
_SEED = 4_256_233
_TOGETHER, _HEAD_TOKENS = 4096, 512
_STATE = "scales"
_HELD_BYTES = 4 << 30
"""Blocks are read once where all of them take no more."""


def tune_scales(
    run: CalibrationRun, bank: BankReader, assignment: Mapping[str, ModuleFormat], steps: int, folder: Path
) -> Bank:
    """Write into `folder` a bank of the candidates of `assignment` in `bank`, the scales of the blocks tuned in so many
    steps of 32 sequences; `run.hidden` has the original's states.

    Steps that the section "learning" of the run's journal has are not done again. `bank.json` is written last.
    Raises InputError for a divergence that is not finite.
    """
    student = _Student(run, bank, {n: f for n, f in assignment.items() if f.quantized})
    factors = _learn(student, steps, run.journal.section("learning"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BANK_NAME).unlink(missing_ok=True)
    modules = {}
    for name, form in student.chosen.items():
        tensors = dict(bank.tensors(name, form))
        if name in factors:
            tensors["weight_scale"] = _scaled(tensors["weight_scale"], factors[name])
        path = folder / f"{name}.safetensors"
        write_safetensors({f"w{form.num_bits}.{part}": tensor for part, tensor in tensors.items()}, path)
        modules[name] = BankModule(file=path.name, file_digest=digest_file(path), candidates=[form])
    ordered = {m.name: modules[m.name] for m in run.inventory.modules if m.name in modules}
    tuned = bank.bank.model_copy(update={"modules": ordered})
    tuned.write(folder / BANK_NAME)
    return tuned


@dataclass(frozen=True)
class _Block:
    """A block, and of its modules by name inside the block: codes less zero points float32 `[N, G, g]`, scales."""

    block: nn.Module
    steps: dict[str, Tensor]
    scales: dict[str, Tensor]


class _Student:
    """The model with the candidates `chosen` of `bank`, its scales times e to the factors that it is given."""

    def __init__(self, run: CalibrationRun, bank: BankReader, chosen: Mapping[str, ModuleFormat]) -> None:
        self.run, self.bank, self.chosen = run, bank, chosen
        self.stream, self.device = run.stream, run.stream.device
        inside = [m for m in run.inventory.modules if m.block is not None]
        self.names = [m.name for m in inside if m.name in chosen]
        self._holds = sum(8 * m.parameters for m in inside) <= _HELD_BYTES
        self._held: dict[int, _Block] = {}
        self._head = self.stream.head()
        outside = {m.role: m.name for m in run.inventory.modules if m.block is None}
        embedding = outside.get("embedding")
        self._table = self._weight(embedding)
        self._head_weight = self._table if run.inventory.tied else self._weight(outside.get("lm_head"))

    def factors(self) -> dict[str, Tensor]:
        """Zeros, by module `[N, G]`."""
        shapes = {name: self.bank.tensors(name, self.chosen[name])["weight_scale"].shape for name in self.names}
        return {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}

    def gradients(self, factors: dict[str, Tensor], rows: list[int], states: HiddenStates) -> float:
        """KL of the sequences `rows`, nats a token; puts its gradients into `factors`. `states` has room for them."""
        for part, of_part in self._parts(rows):
            states.boundary(0)[part] = self.stream.embed(self.run.token_ids[of_part], self._table).cpu()
        for index in range(self.stream.blocks):
            found = self._block(index)
            weights = self._weights(found, factors, index)
            with torch.no_grad():
                for part, _ in self._parts(rows):
                    output = self.stream.run(found.block, states.boundary(index)[part].to(self.device), weights)
                    states.boundary(index + 1)[part] = output.cpu()
        last = self.stream.blocks
        loss = 0.0
        for part, of_part in self._parts(rows):
            loss += self._into_gradients(states.boundary(last)[part], of_part, len(rows), states, part)
        for index in reversed(range(last)):
            self._backward(index, factors, rows, states)
        return loss

    def _backward(self, index: int, factors: dict[str, Tensor], rows: list[int], states: HiddenStates) -> None:
        """From the gradients that boundary `index` + 1 of `states` has to those before the block."""
        found = self._block(index)
        leaves = {name: w.requires_grad_(True) for name, w in self._weights(found, factors, index).items()}
        totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for part, _ in self._parts(rows):
            before = states.boundary(index)[part].to(self.device).requires_grad_(True)
            with half_products(self.device):
                output = self.stream.run(found.block, before, leaves)
            above = states.boundary(index + 1)[part].to(self.device)
            *of_weights, below = torch.autograd.grad(
                output.float(), [*leaves.values(), before], above, allow_unused=True, materialize_grads=True
            )
            for total, gradient in zip(totals.values(), of_weights, strict=True):
                total += gradient
            states.boundary(index)[part] = below.cpu()
        prefix = self.run.inventory.block_prefix(index)
        for local, steps in found.steps.items():
            factor = factors[prefix + local]
            of_scale = (totals[f"{local}.weight"].view(steps.shape) * steps).sum(-1)
            factor.grad = of_scale * found.scales[local].float() * factor.exp()

    def _into_gradients(
        self, ours: Tensor, rows: list[int], sequences: int, states: HiddenStates, part: slice
    ) -> float:
        """Put the gradients by the states after the last block in their place; returns their share of the loss."""
        original = self.run.hidden.boundary(self.stream.blocks)[rows]
        tokens, total = ours.shape[1], 0.0
        gradients = torch.zeros(ours.shape)
        weights = {} if self._head_weight is None else {HEAD_WEIGHT: self._head_weight}
        positions = sequences * (tokens - 1)  # the last predicts nothing
        for number in range(len(rows)):
            for start in range(0, tokens - 1, _HEAD_TOKENS):
                here = slice(start, min(start + _HEAD_TOKENS, tokens - 1))
                leaf = ours[number, here].to(self.device).requires_grad_(True)
                with torch.no_grad():
                    teacher = self._head(original[number, here].to(self.device)).log_softmax(-1)
                student = torch.func.functional_call(self._head, weights, (leaf,)).log_softmax(-1)
                loss = (teacher.exp() * (teacher - student)).sum() / positions
                gradients[number, here] = torch.autograd.grad(loss, leaf)[0].cpu()
                total += float(loss.detach())
        states.boundary(self.stream.blocks)[part] = gradients
        return total

    def _parts(self, rows: list[int]) -> Iterator[tuple[slice, list[int]]]:
        size = max(1, _TOGETHER // self.run.token_ids.shape[1])
        for start in range(0, len(rows), size):
            of_part = rows[start : start + size]
            yield slice(start, start + len(of_part)), of_part

    def _block(self, index: int) -> _Block:
        if index in self._held:
            return self._held[index]
        prefix, steps, scales = self.run.inventory.block_prefix(index), {}, {}
        for name in self.names:
            if name.startswith(prefix):
                form, local = self.chosen[name], name.removeprefix(prefix)
                module = QuantizedModule.unpacked(self.bank.tensors(name, form), form.num_bits)
                zero = module.zero_point if module.zero_point is not None else 1 << (form.num_bits - 1)
                codes = module.codes.float().view(*module.scale.shape, -1)
                zeros = zero.float().unsqueeze(-1) if isinstance(zero, Tensor) else float(zero)
                steps[local] = (codes - zeros).to(self.device)
                scales[local] = module.scale.to(self.device)
        found = _Block(self.stream.block(index), steps, scales)
        if self._holds:
            self._held[index] = found
        return found

    def _weights(self, found: _Block, factors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """As a server computes them from the scales as they are stored."""
        prefix = self.run.inventory.block_prefix(index)
        return {
            f"{local}.weight": (steps * _scaled(found.scales[local], factors[prefix + local]).float().unsqueeze(-1))
            .flatten(1)
            .detach()
            for local, steps in found.steps.items()
        }

    def _weight(self, name: str | None) -> Tensor | None:
        if name is None or name not in self.chosen:
            return None
        return self.bank.dequantized(name, self.chosen[name]).to(self.device)


def _learn(student: _Student, steps: int, journal: Journal) -> dict[str, Tensor]:
    """The factors of the scales after so many steps, by module; each step is kept."""
    run, factors = student.run, student.factors()
    optimizer = torch.optim.Adam(factors.values(), lr=_RATE, betas=(0.9, 0.99))
    sequences = run.token_ids.shape[0]
    batch = min(_BATCH, sequences)
    states = HiddenStates(run.hidden.folder / "scales", batch, *run.hidden.shape[1:])
    kept = journal.load(_STATE)
    done = 0
    if kept is not None:
        done = kept["steps"]
        optimizer.load_state_dict(kept["optimizer"])
        for factor, value in zip(factors.values(), kept["factors"], strict=True):
            factor.copy_(value)
    for step in run.progress.over(range(steps), SCALES_STEP, "step"):
        if step < done:
            run.progress.skip()
            continue
        loss = student.gradients(factors, _rows(sequences, batch, step), states)
        require_finite(torch.tensor(loss), "the divergence that scales are tuned by", "leave it out: --scale-steps 0")
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        optimizer.step()
        _LOG.info("scales through the model, step %d of %d: %.4g nats a token", step + 1, steps, loss)
        journal.save(
            _STATE,
            {
                "steps": step + 1,
                "factors": [factor.cpu() for factor in factors.values()],
                "optimizer": optimizer.state_dict(),
            },
        )
    states.remove()
    return {name: factor.detach() for name, factor in factors.items()}


def _rows(sequences: int, batch: int, step: int) -> list[int]:
    """Sequences of a step: all in a random order, again and again."""
    found: list[int] = []
    first = step * batch
    while len(found) < batch:
        time, at = divmod(first + len(found), sequences)
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed(_SEED + time)).tolist()
        found += order[at : at + batch - len(found)]
    return found


def _scaled(scale: Tensor, factor: Tensor) -> Tensor:
    limits = torch.finfo(scale.dtype)
    return (scale.to(factor.device).float() * factor.exp()).clamp(limits.tiny, limits.max).to(scale.dtype)
