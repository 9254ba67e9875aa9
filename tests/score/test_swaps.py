"""What a swapped candidate does to its block, from where it is swapped on, is what running the whole block gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from allocator.blocks import BlockStream
from allocator.blocks.products import only_float32
from allocator.contract.layout import ModuleFormat
from allocator.model import cut_unsorted, read_inventory
from allocator.score.swapped_block import NEARLY, Batch
from allocator.score.swaps import measure_swaps
from tests.families import make_family

FORM = ModuleFormat(shape=(32, 32), num_bits=4, group_size=32, symmetric=False)


class Moved:
    """Two candidates of every linear module of a block, a small and a large step away, and the source."""

    kept_bytes = 0

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        self.formats = {name: [FORM, FORM, FORM] for name in names if not name.endswith("mlp.gate")}

    def weight(self, name: str, candidate: int) -> torch.Tensor:
        source = self._block.get_parameter(f"{name}.weight").data
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(candidate))
        return source + (0.2, 0.01)[candidate] * source.std() * noise


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "qwen3_moe", "mixtral", "cut"])
def test_errors_are_those_of_whole_blocks(kind: str, tiny_model: Callable[[str], Path]) -> None:
    inventory = read_inventory(tiny_model("llama" if kind == "cut" else kind))
    _are_those_of_whole_blocks(BlockStream(cut_unsorted(inventory, 3) if kind == "cut" else inventory), 1)


def test_errors_of_experts_go_through_what_comes_behind_them(tmp_path: Path) -> None:
    """Nemotron-H has a projection there."""
    _are_those_of_whole_blocks(BlockStream(read_inventory(make_family("nemotron_h_moe", tmp_path))), 2)


def _are_those_of_whole_blocks(stream: BlockStream, index: int) -> None:
    block, width = stream.block(index), stream.inventory.shape.hidden_size
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(3, 40, width, generator=generator)
    with torch.inference_mode():
        teacher = stream.run(block, states)
    gradients = torch.randn(4, 3, 40, width, generator=generator)
    batches = {
        number: Batch(states[rows], teacher[rows], gradients[:, rows])
        for number, rows in {0: slice(0, 2), 5: slice(2, 3)}.items()
    }
    read = {number: lambda batch=batch: batch for number, batch in batches.items()}
    with only_float32():
        fast, whole = (
            measure_swaps(stream, block, Moved(block), read, torch.clone, whole_blocks=whole) for whole in (False, True)
        )
    assert list(fast[5]) == list(whole[5])
    assert len(fast[0]) > 3
    for number, of_batch in whole.items():
        allowed = 2e-4 if number == 0 else 1.5 * NEARLY  # small errors were tried on the first batch
        for name, errors in of_batch.items():
            for found, expected in zip(fast[number][name], errors, strict=True):
                assert float((found - expected).norm()) <= allowed * float(expected.norm()), (name, number)
            assert not fast[number][name][-1].any()
            assert errors[:-1].square().sum(1).min() > 0 or ".experts." in name


def _second_block(model: Path) -> tuple[BlockStream, nn.Module, Batch]:
    """The second block of `model`, and two sequences with three probes."""
    stream = BlockStream(read_inventory(model))
    block = stream.block(1)
    states, *gradients = torch.randn(4, 2, 40, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        teacher = stream.run(block, states)
    return stream, block, Batch(states, teacher, torch.stack(gradients))


def test_gradients_below_the_block_come_with_its_measurements(tiny_model: Callable[[str], Path]) -> None:
    stream, block, batch = _second_block(tiny_model("llama"))
    below: dict[int, torch.Tensor] = {}
    measure_swaps(
        stream, block, Moved(block), {3: lambda: batch}, torch.clone,
        below=lambda number, probe, gradient: below.update({number + probe: gradient}),
    )  # fmt: skip
    states = batch.states.requires_grad_(True)
    output = stream.run(block, states)
    for probe, gradient in enumerate(batch.gradients):
        (expected,) = torch.autograd.grad(output, states, gradient, retain_graph=True)
        # To three digits: they are rounded to bfloat16 when they are kept.
        assert float((below[3 + probe] - expected).norm()) <= 0.01 * float(expected.norm())


def test_small_errors_are_measured_without_what_stands_behind(tiny_model: Callable[[str], Path]) -> None:
    """Of the second batch, to three digits; those that are no longer small are measured as ever."""
    stream, block, batch = _second_block(tiny_model("llama"))
    with only_float32():
        found = measure_swaps(stream, block, Moved(block), {0: lambda: batch, 1: lambda: batch}, torch.clone)
    small, large = ([found[n]["self_attn.o_proj"][c] for n in (0, 1)] for c in (1, 0))
    assert torch.equal(*large)
    assert not torch.equal(*small)
    assert float((small[0] - small[1]).norm()) <= NEARLY * float(small[0].norm())
