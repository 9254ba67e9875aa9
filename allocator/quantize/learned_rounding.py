"""Learned rounding: the codes and scales of a block's modules, learned together against the block's output.

Every weight has a place on its group's grid, a real number whose nearest code is taken, and every group a factor of its
scale. Gradients go through the rounding as if it were not there (straight-through, as in EfficientQAT's Block-AP, Chen
et al. 2024), from where GPTQ has put them. What is learned by is what the error costs the model's predictions (see
`reconstruction`), where AdaRound, BRECQ and AutoRound take the squared error of the output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.blocks.finite import require_finite
from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.quantize.gptq import Gptq
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Statistics
from allocator.quantize.reconstruction import Reconstruction

__all__ = ["Candidate", "Learned", "LearnedRounding"]

_INSIDE = 0.45
"""How far from its code a weight's place may begin: half a step is the border of the next one."""

_JUDGEMENTS = 4
"""How often the sequences that were held back are asked."""


@dataclass(frozen=True)
class Candidate:
    """A module's weight as float32 `[N, K]`, and as it is quantized so far, in `form`."""

    weight: Tensor
    form: ModuleFormat
    quantized: QuantizedModule


@dataclass(frozen=True)
class Learned:
    """The modules as they were learned, by name in the block, and the loss on the sequences that were held back, nats
    a token: of the candidates that were begun with, and of these."""

    modules: dict[str, QuantizedModule]
    loss_before: float
    loss: float


class LearnedRounding:
    """`learned-rounding`: needs what gptq needs, gradients of the model's predictions, and many passes a block.

    iterations: steps a block and width; batch: sequences a step; learning_rate: of a code's place, in codes, and
    scale_learning_rate, of the logarithm of a scale, both falling to zero; damping: gptq's; draws: probes of the
    gradients; own_share: see `Reconstruction`; up_to_bits: wider candidates stay gptq's.
    """

    name = "learned-rounding"
    statistics: Statistics = "hessian"

    def __init__(
        self,
        iterations: float = 200,
        batch: float = 4,
        learning_rate: float = 0.005,
        scale_learning_rate: float = 0.002,
        damping: float = 0.01,
        draws: float = 4,
        own_share: float = 0.3,
        up_to_bits: float = 4,
    ) -> None:
        whole = {"iterations": iterations, "batch": batch, "draws": draws, "up_to_bits": up_to_bits}
        for key, value in whole.items():
            if value < 1 or value != int(value):
                raise InputError(f"{self.name}: {key} {value:g} must be a whole number from 1 on")
        rates = {"learning_rate": learning_rate, "scale_learning_rate": scale_learning_rate}
        for key, value in rates.items():
            if not 0 <= value < 1:
                raise InputError(f"{self.name}: {key} {value:g} must be at least 0 and below 1")
        if not 0 <= own_share <= 1:
            raise InputError(f"{self.name}: own_share {own_share:g} must be from 0 to 1")
        self.iterations, self.batch, self.draws = int(iterations), int(batch), int(draws)
        self.rates = (learning_rate, scale_learning_rate)
        self.own_share, self.up_to_bits = own_share, int(up_to_bits)
        self._start = Gptq(damping)

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        """What learning begins with; also what an embedding and an lm_head keep."""
        return self._start.quantize(weight, module, dtype, statistics)

    def learns(self, form: ModuleFormat) -> bool:
        """Whether candidates of this width are learned."""
        return form.num_bits <= self.up_to_bits

    def passes(self, sequences: int) -> float:
        """Times the arithmetic of running a block on all of so many sequences that one width takes."""
        forward_and_backward = 3
        return forward_and_backward * self.iterations * min(self.batch, sequences) / sequences

    def learn(
        self,
        task: Reconstruction,
        start: Mapping[str, Candidate],
        seed: int,
        tell: Callable[[float, str], None] = lambda _share, _detail: None,
    ) -> Learned:
        """Learn the modules `start` of the block together; the same for the same seed.

        What is returned is the best on the sequences that are held back, `start` itself if nothing is better. `tell` is
        given the share of the work that was done, and what is at hand. Raises InputError for a loss that is not finite.
        """
        modules = {name: _LearnedModule(candidate) for name, candidate in start.items()}
        optimizers = {name: self._optimizer(module) for name, module in modules.items()}
        held_back = task.held_back()
        least = before = task.loss(_weights(modules), held_back)
        best = {name: candidate.quantized for name, candidate in start.items()}
        batches = _batches(task.learned(), self.batch, seed)
        judged = {self.iterations * n // _JUDGEMENTS for n in range(1, _JUDGEMENTS + 1)}
        for step in range(1, self.iterations + 1):
            loss, gradients = task.gradient(_weights(modules, task.dtype), next(batches))
            _require_finite(task, loss)
            left = 1 - (step - 1) / self.iterations
            for name, module in modules.items():
                module.step(optimizers[name], gradients.pop(f"{name}.weight"), [rate * left for rate in self.rates])
            if step in judged:
                found = task.loss(_weights(modules), held_back)
                if found < least:
                    least, best = found, {name: module.quantized() for name, module in modules.items()}
            tell(1 / self.iterations, f"loss {loss:.3g}, {least:.3g} of {before:.3g} on text held back")
        return Learned(best, before, least)

    def _optimizer(self, module: "_LearnedModule") -> torch.optim.Adam:
        groups = [{"params": [of], "lr": rate} for of, rate in zip(module.parameters(), self.rates, strict=True)]
        return torch.optim.Adam(groups, betas=(0.9, 0.99))


class _LearnedModule:
    """One module while it is learned. place: of each weight on its grid `[N, G, g]`; factor: logarithm of what each
    scale is multiplied by, `[N, G, 1]`."""

    def __init__(self, candidate: Candidate) -> None:
        rows = candidate.weight.shape[0]
        start = candidate.quantized
        self._dtype, self._symmetric = start.scale.dtype, start.zero_point is None
        self._steps = (1 << candidate.form.num_bits) - 1
        device = candidate.weight.device
        self._begun = start.scale.to(device).float().unsqueeze(-1)
        middle = float(1 << (candidate.form.num_bits - 1))
        zero = torch.full_like(self._begun, middle) if start.zero_point is None else start.zero_point.unsqueeze(-1)
        self._zero = zero.to(device).float()
        codes = start.codes.to(device).float().view(rows, self._begun.shape[1], -1)
        # As near to the original weight as the code that GPTQ has chosen allows.
        place = candidate.weight.view(codes.shape) / self._begun + self._zero
        self._place = torch.clamp(place, codes - _INSIDE, codes + _INSIDE)
        self._factor = torch.zeros_like(self._begun)

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self._place, self._factor

    def weight(self) -> Tensor:
        """As a server computes it from what `quantized` returns: float32 `[N, K]`."""
        return ((self._place.round() - self._zero) * self._scale().float()).flatten(1)

    def step(self, optimizer: torch.optim.Optimizer, gradient: Tensor, rates: Sequence[float]) -> None:
        """One step by the gradient of `weight`, rounding being taken for the identity, at these rates."""
        of_weight = gradient.view(self._place.shape).float()
        scale = self._scale().float()
        self._factor.grad = ((self._place.round() - self._zero) * of_weight).sum(-1, keepdim=True).mul_(scale)
        self._place.grad = of_weight.mul_(scale)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()  # what one module needs of memory is let go before the next
        # No place is beyond the grid, where it would have no way back.
        self._place.clamp_(-_INSIDE, self._steps + _INSIDE)

    def quantized(self) -> QuantizedModule:
        zero = None if self._symmetric else self._zero.squeeze(-1).to(torch.uint8)
        return QuantizedModule(
            self._place.round().to(torch.uint8).flatten(1), self._scale().squeeze(-1).clone(), zero
        )  # fmt: skip

    def _scale(self) -> Tensor:
        limits = torch.finfo(self._dtype)
        return (self._begun * self._factor.exp()).clamp(limits.tiny, limits.max).to(self._dtype)


def _weights(modules: Mapping[str, _LearnedModule], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight().to(dtype) for name, module in modules.items()}


def _batches(sequences: list[int], size: int, seed: int) -> Iterator[list[int]]:
    """All sequences in a random order, again and again, `size` at a time."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        while len(left) < min(size, len(sequences)):
            left += [sequences[i] for i in torch.randperm(len(sequences), generator=generator).tolist()]
        yield left[:size]
        left = left[size:]


def _require_finite(task: Reconstruction, loss: float) -> None:
    name = task.stream.inventory.block_prefix(task.index)[:-1]
    advice = "take another --quantizer, or a lower learning_rate"
    require_finite(torch.tensor(loss), f"{name}: the loss that its rounding is learned by", advice)
