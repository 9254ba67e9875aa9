"""One decoder block on one batch of text, with one weight exchanged at a time.

Nothing before a module depends on it, so the block is run once and then again from the module that is swapped (see
`blocks.replay`). Where the output is a sum that a module adds to, as down_proj mostly does, that module is not run
again either: the gradients are taken back through its weight once, and meet the change of its input.

An error may also be so small that what it does further on is as good as linear. Then it meets the gradients where it
comes about, or at the next module behind which each token is alone (o_proj): what stands behind is not run again. That
is tried on the text's first batch: a way that gives the same errors, to within `NEARLY` of their size, is taken for the
others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from allocator.blocks.backward import BlockBackward
from allocator.blocks.products import linear_of_change
from allocator.blocks.replay import Replay, ReplayError
from allocator.blocks.stream import BlockStream
from allocator.score.ends import Ends
from allocator.score.objective import errors_along

__all__ = ["NEARLY", "Batch", "SwappedBlock", "Way"]

Way = Literal["exact", "at the module", "at the next end"]

NEARLY = 0.01
"""The root mean square, over that of the errors, by which errors may be others: a score then moves by 1e-4 of its value
as far as the two are independent (by up to 3e-3 as measured), where the text's choice moves it by some per cent."""

_MOST_PULLED_BYTES = 1 << 30
"""Of gradients at modules inside the block; where they are more, the modules are run again."""


@dataclass(frozen=True)
class Batch:
    """states, teacher: input and output of the original block `[B, T, D]`; gradients: at the output `[S, B, T, D]`."""

    states: Tensor
    teacher: Tensor
    gradients: Tensor

    @property
    def tokens(self) -> int:
        return self.states.shape[0] * self.states.shape[1]


class SwappedBlock:
    """read: the batch, which must not be tensors of inference mode. ends: None to run the whole block for each weight.
    below: is given the number of each probe, and its gradient at the block's input `[B, T, D]`."""

    def __init__(
        self,
        stream: BlockStream,
        block: nn.Module,
        read: Callable[[], Batch],
        ends: Ends | None,
        below: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._stream, self._block = stream, block
        with torch.inference_mode(False):
            self._batch = read()
        self._replay: Replay | None = None
        self._before_end: set[str] = set()  # modules behind which an end was passed
        if ends is None:
            return
        batch = self._batch
        probes = batch.gradients.shape[0]
        self._ends = ends.within(_MOST_PULLED_BYTES // (4 * probes * batch.tokens))
        self._gradients = _by_token(batch.gradients)
        with torch.inference_mode(False):
            self._pull(below)
        self._replay = Replay({**self._ends.additive, **self._ends.nearly_linear})
        with self._replay:
            self._output = stream.run(block, batch.states)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept of the batch."""
        gradients = self._batch.gradients.nbytes
        if self._replay is None:
            return gradients
        pulled = [self._gradients, *self._pulled.values(), *self._at_outputs.values()]
        return gradients + sum(g.nbytes for g in pulled) + self._replay.nbytes

    def errors(self, name: str, weight: Tensor, way: Way = "exact") -> Tensor:
        """`errors_along` of the block's output with `weight` in the place of that of module `name`: `[B * S * T]`."""
        if self._replay is not None and way == "at the module":
            return self._errors_at_module(self._replay, name, weight)
        parameter = f"{name}.weight"
        if self._replay is not None:
            self._replay.passed = () if way == "at the next end" else self._ends.nearly_linear
            try:
                errors = self._errors_by_replay(self._replay, parameter, weight)
                if self._replay.went_past:
                    self._before_end.add(name)
                return errors
            except ReplayError:
                self._replay = None
        output = self._stream.run(self._block, self._batch.states, {parameter: weight})
        return errors_along(output, self._batch.teacher, self._batch.gradients)

    def way_near(self, name: str, weight: Tensor, errors: Tensor) -> Way | None:
        """The cheapest way to `errors`, those of the exact one, to within `NEARLY`; None if there is none."""
        if self._replay is None:
            return None
        for way in self._ways(name):
            if float((self.errors(name, weight, way) - errors).norm()) <= NEARLY * float(errors.norm()):
                return way
        return None

    def _ways(self, name: str) -> list[Way]:
        ends = self._ends.nearly_linear
        found: list[Way] = ["at the module"] if name in ends else []
        return [*found, "at the next end"] if name in self._before_end else found

    def _pull(self, below: Callable[[int, Tensor], None] | None) -> None:
        ends, batch = self._ends, self._batch
        inputs_of, outputs_of = [*ends.additive, *ends.nearly_linear], [*ends.nearly_linear]
        backward = BlockBackward(self._stream, self._block, batch.states, inputs_of, outputs_of, True)
        probes = len(batch.gradients)
        inputs: dict[str, list[Tensor]] = {name: [] for name in inputs_of}
        outputs: dict[str, list[Tensor]] = {name: [] for name in outputs_of}
        for probe, gradient in enumerate(batch.gradients):
            pulled = backward.pull(gradient, probe == probes - 1)
            if below is not None:
                below(probe, pulled.at_states)
            for name, at_input in pulled.at_inputs.items():
                inputs[name].append(at_input)
            for name, at_output in pulled.at_outputs.items():
                outputs[name].append(at_output)
        # Each list goes when its tensor is made: they are the largest things in memory.
        self._pulled = {name: _by_token(inputs.pop(name)) for name in inputs_of}
        self._at_outputs = {name: _by_token(outputs.pop(name)) for name in outputs_of}

    def _errors_at_module(self, replay: Replay, name: str, weight: Tensor) -> Tensor:
        change = linear_of_change(replay.inputs_of_ends[name], weight - self._ends.nearly_linear[name]).float()
        return self._as_numbers(_along(self._at_outputs[name], change))

    def _errors_by_replay(self, replay: Replay, parameter: str, weight: Tensor) -> Tensor:
        module, _, own = parameter.rpartition(".")
        replay.exchange(getattr(self._block.get_submodule(module), own), weight)
        with replay:
            output = self._stream.run(self._block, self._batch.states, {parameter: weight})
        along = self._gradients.new_zeros(self._gradients.shape[:2])  # [B * T, S]
        if output is not self._output:
            along += _along(self._gradients, output - self._output)  # what rounding the two have in common goes
        for name, inputs in replay.at_ends.items():
            along += _along(self._pulled[name], inputs - replay.inputs_of_ends[name])
        return self._as_numbers(along)

    def _as_numbers(self, along: Tensor) -> Tensor:
        """`[B * T, S]` in the order of `errors_along`."""
        sequences, tokens, _ = self._batch.states.shape
        return along.view(sequences, tokens, -1).transpose(1, 2).flatten()


def _by_token(gradients: Sequence[Tensor] | Tensor) -> Tensor:
    """Of each probe `[B, T, K]`, to `[B * T, S, K]`, in one piece."""
    return torch.stack([gradient.flatten(0, 1) for gradient in gradients], 1)


def _along(gradients: Tensor, errors: Tensor) -> Tensor:
    """Errors `[B, T, K]` along gradients `[B * T, S, K]`: `[B * T, S]`."""
    return torch.bmm(errors.reshape(len(gradients), 1, -1), gradients.transpose(1, 2)).squeeze(1)
