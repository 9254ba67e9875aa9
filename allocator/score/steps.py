"""What learning will take: its steps in their order, each with its arithmetic, before any of it has been timed.

Multiplications and additions of the dense products; the rest of the arithmetic goes with them. It is for the time left
of steps that have not begun (see `progress.Tracker`), which is measured as soon as they have.
"""

from collections.abc import Sequence

from allocator.blocks.gradients import GRADIENTS_STEP
from allocator.contract.layout import ModuleFormat
from allocator.model import Inventory, Module
from allocator.quantize.bank_builder import CANDIDATES_STEP, VOCABULARY_STEP
from allocator.quantize.block_learning import ROUNDING_STEP
from allocator.quantize.learned_rounding import LearnedRounding
from allocator.quantize.quantizer import Statistics
from allocator.quantize.statistics import EMBEDDING_STEP
from allocator.run.progress import PlannedStep
from allocator.score.settings import LearningSettings

__all__ = ["learning_steps"]

_GRID = 600
"""Arithmetic a weight and width of the search for a grid and of rounding, in products of the same time (measured)."""


def learning_steps(
    inventory: Inventory,
    formats: dict[str, list[ModuleFormat]],
    statistics: Statistics,
    settings: LearningSettings,
    tokens: int,
    has_bank: bool,
    rounding: LearnedRounding | None = None,
    sequences: int = 1,
) -> list[PlannedStep]:
    """The steps from the calibration text to the scores. `formats`: the candidates below 16 bits of each module;
    `tokens`: of the calibration text, in `sequences`; `rounding`: the quantizer, if it is one that learns. Only those
    of the method `gamma` are known beforehand."""
    modules = [m for m in inventory.modules if formats.get(m.name)]
    inside, outside = _split(modules)
    all_inside = _split(inventory.modules)[0]
    forward = sum(_product(inventory, m, tokens) for m in all_inside)
    vocabulary, width = inventory.shape.vocabulary, inventory.shape.hidden_size
    head = 2.0 * tokens * vocabulary * width
    embedding = any(m.role == "embedding" for m in outside)
    steps = []
    if has_bank:
        steps.append(PlannedStep("teacher states", forward))
    else:
        if statistics == "kronecker":
            steps += [PlannedStep("teacher states", forward), PlannedStep(GRADIENTS_STEP, 3 * head)]
        quantized = sum(_quantization(m, len(formats[m.name]), statistics, tokens) for m in inside)
        steps.append(PlannedStep(CANDIDATES_STEP, (9 if statistics == "kronecker" else 1) * forward + quantized))
        if embedding and statistics in ("diagonal", "hessian") and rounding is None:
            steps += [PlannedStep(GRADIENTS_STEP, 3 * head), PlannedStep(EMBEDDING_STEP, 2 * forward)]
        if rounding is not None:
            learned = {f.num_bits for m in inside for f in formats[m.name] if rounding.learns(f)}
            passes = 1 + rounding.draws + len(learned) * rounding.passes(sequences)
            steps += [
                PlannedStep(GRADIENTS_STEP, (1 + rounding.draws) * head),
                PlannedStep(ROUNDING_STEP, forward * passes),
            ]
        if outside:
            of_outside = sum(_quantization(m, len(formats[m.name]), statistics, tokens) for m in outside)
            steps.append(PlannedStep(VOCABULARY_STEP, of_outside))
    if settings.method != "gamma":
        return [*steps, PlannedStep("measuring")]
    by_block: dict[int | None, float] = {}
    for m in all_inside:
        by_block[m.block] = by_block.get(m.block, 0.0) + _product(inventory, m, tokens)
    swaps = sum(_swap(inventory, m, tokens, by_block) * len(formats[m.name]) for m in inside)
    steps += [
        PlannedStep(GRADIENTS_STEP, 3 * head),  # the logits, and the two terms of the gradients of all draws
        PlannedStep("measuring", swaps + (1 + settings.draws) * forward),
    ]
    if outside:
        widths = max(len(formats[m.name]) for m in outside)
        steps.append(PlannedStep("measuring the vocabulary", (2 + widths) * head))
    return steps


def _split(modules: Sequence[Module]) -> tuple[list[Module], list[Module]]:
    """Those of blocks, and those outside."""
    return [m for m in modules if m.block is not None], [m for m in modules if m.block is None]


def _product(inventory: Inventory, module: Module, tokens: int) -> float:
    """Of one pass; an expert sees the tokens that choose it."""
    return 2.0 * module.parameters * tokens * _share(inventory, module)


def _share(inventory: Inventory, module: Module) -> float:
    experts = inventory.shape.experts
    return 1.0 if experts is None or ".experts." not in module.name else experts.per_token / experts.count


def _swap(inventory: Inventory, module: Module, tokens: int, by_block: dict[int | None, float]) -> float:
    """An expert is measured alone, every other module by what lies behind it: about half of the block."""
    return _product(inventory, module, tokens) if ".experts." in module.name else by_block[module.block] / 2


def _quantization(module: Module, widths: int, statistics: Statistics, tokens: int) -> float:
    rows, columns = module.shape
    of_matrices = statistics in ("hessian", "kronecker")
    moments = 4.0 * tokens * columns**2 if of_matrices else 0.0
    elimination = float(rows) * columns**2 if of_matrices else 0.0
    return moments / 2 + widths * (elimination + _GRID * rows * columns)
