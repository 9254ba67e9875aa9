"""What `gamma` would be without gradients: the size of each swap's error in its block's output, and three ways to make
errors of different blocks comparable: not at all, by the size of the output, and by what they do to the final KL.
"""

import torch
from torch import Tensor

from benchmarks.allocation.laboratory import Laboratory

__all__ = ["WEIGHTINGS", "block_error_tables"]

WEIGHTINGS = ("block error", "relative block error", "block error x KL weight")
_PROBED_BITS = 3


def block_error_tables(lab: Laboratory) -> dict[str, Tensor]:
    """By name of `WEIGHTINGS`, scores `[modules, widths]` of single swaps on the original's states (teacher forcing).

    The KL weight of a block is measured once: the KL of the model with all modules of that block at 3 bits, by the
    error that they make together in the block's output.
    """
    student = lab.calibration
    states = student.states({})
    tables = {name: torch.zeros(len(lab.names), len(lab.widths), dtype=torch.float64) for name in WEIGHTINGS}
    for index in range(lab.stream.blocks):
        block, candidates = student.block(index)
        names = student.local_names(index)

        def error(weights: dict[str, Tensor], index: int = index, block: torch.nn.Module = block) -> float:
            pairs = zip(states[index], states[index + 1], strict=True)
            with torch.no_grad():
                return sum(
                    float((lab.stream.run(block, x, weights) - y).square().sum(dtype=torch.float64)) for x, y in pairs
                )

        probed = lab.widths.index(_PROBED_BITS)
        together = error({f"{local}.weight": candidates.weight(local, probed) for local in names})
        plan = [_PROBED_BITS if name in names.values() else 16 for name in lab.names]
        weight = float(student.losses(lab.assignment(plan)).kl.mean()) / together
        size = sum(float(y.square().sum(dtype=torch.float64)) for y in states[index + 1])
        for local, name in names.items():
            count = len(candidates.formats[local]) - 1
            errors = [error({f"{local}.weight": candidates.weight(local, i)}) for i in range(count)]
            row = torch.tensor([*errors, 0.0], dtype=torch.float64)
            position = lab.names.index(name)
            for table, factor in zip(tables.values(), (1.0, 1 / size, weight), strict=True):
                table[position] = factor * row
    return tables
