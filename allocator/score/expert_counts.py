"""Experts that calibration text hardly chooses: how often each is chosen, and scores that do not trust a few tokens.

The score of an expert that n tokens chose rests on these n. Of one that none chose it is 0, and would cost it all its
bits, while other text may choose it as often as any. So scores are drawn towards those of the other experts
(Bühlmann's credibility, 1967): Z s + (1 - Z) m with Z = n / (n + k). m is the mean over the experts of the block of the
same matrix at the same width, each weighed by its Z.
"""

import logging
from functools import partial

import torch
from torch import Tensor, nn

from allocator.blocks.stream import batches
from allocator.blocks.structure import Experts
from allocator.score.swaps import record_routes
from allocator.score.task import Task

__all__ = ["HALF_BELIEVED", "count_expert_tokens", "tell_hardly_seen", "with_credibility"]

HALF_BELIEVED = 32
"""k: of so many tokens an expert's own score counts as much as that of the others. The squared relative error of a mean
over n tokens is c / n, where c is 1 + the squared coefficient of variation of a token's loss; k is c by the squared
relative spread of the experts' true scores."""

_SHOWN = 6
_LOG = logging.getLogger(__name__)


def count_expert_tokens(task: Task) -> dict[str, int]:
    """By name of each expert (`model.layers.3.mlp.experts.7`) how many tokens of the calibration text chose it; empty
    for a model without experts."""
    counts: dict[str, int] = {}
    if any(".experts." in name for name in task.bank.bank.modules):
        for index in task.progress.over(range(task.stream.blocks), "counting experts", "block"):
            counts |= task.journal.once(f"experts-{index:04d}", partial(_count, task, index))
    return counts


def _count(task: Task, index: int) -> dict[str, int]:
    block = task.stream.block(index)
    experts = next(((name, m) for name, m in block.named_modules() if isinstance(m, Experts)), None)
    if experts is None:
        return {}
    name, of_block = experts
    mine = {
        number: _chosen(task, block, index, rows, len(of_block))
        for number, rows in task.journal.process_group.share(batches(task.hidden.shape))
    }
    total = torch.stack(task.journal.process_group.gather(mine)).sum(0).tolist()
    return {task.module(index, f"{name}.{expert}"): int(count) for expert, count in enumerate(total)}


def _chosen(task: Task, block: nn.Module, index: int, rows: slice, experts: int) -> Tensor:
    states = task.hidden.boundary(index)[rows].to(task.stream.device)
    chosen = record_routes(task.stream, block, states).chosen.flatten().cpu()
    return torch.bincount(chosen, minlength=experts)[:experts]


def with_credibility(scores: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    """`scores` `[C]` by module, those of experts drawn towards the mean of their kind; `counts` as above."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in scores:
        expert, _, matrix = name.rpartition(".")
        if expert in counts:
            kinds.setdefault((expert.rpartition(".")[0], matrix), []).append(name)
    found = dict(scores)
    for names in kinds.values():
        seen = torch.tensor([counts[name.rpartition(".")[0]] for name in names], dtype=torch.float64)
        belief = (seen / (seen + HALF_BELIEVED)).unsqueeze(1)
        own = torch.stack([scores[name] for name in names])
        mean = (belief * own).sum(0) / belief.sum().clamp_min(1e-300)
        found |= dict(zip(names, (belief * own + (1 - belief) * mean).to(own.dtype).unbind(), strict=True))
    return found


def tell_hardly_seen(counts: dict[str, int], tokens: int) -> dict[str, int]:
    """Log which experts were chosen less than `HALF_BELIEVED` times, and return them with their counts."""
    few = {name: count for name, count in counts.items() if count < HALF_BELIEVED}
    if few:
        rarest = sorted(few, key=lambda name: few[name])
        shown = ", ".join(f"{name} ({few[name]})" for name in rarest[:_SHOWN])
        never = sum(count == 0 for count in few.values())
        _LOG.warning(
            "of %d experts the %d tokens of calibration text never chose %d, and %d less than %d times: %s%s. Their "
            "scores are drawn towards those of the others of their block; give more text, and of more kinds",
            len(counts), tokens, never, len(few) - never, HALF_BELIEVED, shown,
            f" and {len(few) - _SHOWN} more (all are in the scores file)" if len(few) > _SHOWN else "",
        )  # fmt: skip
    return few
