"""What a block's error does to the model: nats of KL per unit of `objective.reconstruction_loss`, measured once.

Losses of blocks are not comparable across depth. So each block in turn is quantized as a whole, its erroneous output
is carried through the rest of the original model, and the KL divergence of the final distribution is read. All those
states travel together, so that every block is loaded once.
"""

import torch
from torch import Tensor, nn

from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.candidates.reader import BankReader
from allocator.learning.objective import reconstruction_loss
from allocator.progress import Progress, silent

__all__ = ["measure_block_weights"]

_PROBE_BITS = 3
_HEAD_TOKENS = 512


def measure_block_weights(
    stream: BlockStream, bank: BankReader, hidden: HiddenStates, probe_tokens: int, progress: Progress = silent
) -> list[float]:
    """Weight of each block, from about `probe_tokens` tokens of the calibration text; 0 for a block without candidates.

    The probing error is that of all modules of the block at 3 bits, or the width nearest to it.
    """
    count = max(1, probe_tokens // hidden.shape[1])
    losses: list[float] = []
    travelling: dict[int, Tensor] = {}
    with torch.inference_mode():
        for index in range(stream.blocks):
            progress("block weights", index / stream.blocks)
            block = stream.block(index)
            travelling = {origin: stream.run(block, states) for origin, states in travelling.items()}
            weights = _probe_weights(stream, bank, index)
            teacher = hidden.boundary(index + 1)[:count].to(stream.device)
            probed = stream.run(block, hidden.boundary(index)[:count].to(stream.device), weights)
            losses.append(float(reconstruction_loss(probed, teacher)) if weights else 0.0)
            if losses[-1] > 0:
                travelling[index] = probed
        head = stream.head()
        final = hidden.boundary(stream.blocks)[:count].to(stream.device)
        divergences = {origin: _divergence(head, final, states) for origin, states in travelling.items()}
    progress("block weights", 1.0)
    return [divergences[i] / loss if i in divergences else 0.0 for i, loss in enumerate(losses)]


def _probe_weights(stream: BlockStream, bank: BankReader, index: int) -> dict[str, Tensor]:
    prefix = stream.inventory.block_prefix(index)
    weights = {}
    for name, module in bank.bank.modules.items():
        if name.startswith(prefix):
            candidate = min(module.candidates, key=lambda c: abs(c.num_bits - _PROBE_BITS))
            weights[f"{name.removeprefix(prefix)}.weight"] = bank.dequantized(name, candidate).to(stream.device)
    return weights


def _divergence(head: nn.Module, teacher: Tensor, states: Tensor) -> float:
    """Mean KL(teacher || states) of the next token, in nats; both `[B, T, D]` before the final norm."""
    total, tokens = 0.0, teacher.shape[0] * teacher.shape[1]
    batches = (torch.split(s.flatten(0, 1), _HEAD_TOKENS) for s in (teacher, states))
    for rows, ours in zip(*batches, strict=True):
        p, q = head(rows).log_softmax(-1), head(ours).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / tokens
