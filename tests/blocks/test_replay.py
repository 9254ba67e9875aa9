"""A function that is run again with another weight gives what it gives anew, and runs no more than it has to."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allocator.blocks.replay import Replay, ReplayError

X, A, B, C = (torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4))


class Counting(TorchFunctionMode):
    """Names of the operations that are really run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def model(a: Tensor, b: Tensor, c: Tensor = C) -> Tensor:
    first = F.linear(X, a)
    first /= first.sum(-1, keepdim=True)
    parts = (first * 2).chunk(2, -1)
    return first + F.linear(F.silu(torch.cat(parts, -1)) * F.linear(X, b), c)


def test_only_what_follows_from_the_other_weight_is_run() -> None:
    with torch.inference_mode():
        replay = Replay({})
        with replay:
            first = model(A, B)
        for weights in ((A + 1, B), (A, B - 1), (A, B, C * 2)):
            with Counting() as ran, replay:
                again = model(*weights)
            torch.testing.assert_close(again, model(*weights))
            assert ran.names.count("silu") == (weights[0] is not A)
            assert ran.names.count("div_") == (weights[0] is not A)
        with Counting() as ran, replay:
            assert model(A, B) is first
        assert set(ran.names) <= {"untyped_storage"}
        torch.testing.assert_close(first, model(A, B))


def test_the_input_of_an_end_is_told_instead_of_running_it() -> None:
    with torch.inference_mode():
        replay = Replay({"c": C})
        with replay:
            first = model(A, B)
        with replay:
            beside = model(A + 1, B)
        step = F.linear(replay.at_ends["c"] - replay.inputs_of_ends["c"], C)
        torch.testing.assert_close(beside + step, model(A + 1, B), rtol=1e-4, atol=1e-4)
        with replay:
            assert model(A, B) is first
        assert not replay.at_ends


def test_an_end_that_is_passed_is_run_and_told() -> None:
    with torch.inference_mode():
        replay = Replay({"c": C})
        with replay:
            model(A, B)
        replay.passed = ["c"]
        with replay:
            torch.testing.assert_close(model(A + 1, B), model(A + 1, B))
        assert replay.went_past == {"c"}
        assert not replay.at_ends


def test_a_product_of_which_little_changed_is_as_exact_as_the_change() -> None:
    """Also where products of changes are made in bfloat16: to three digits of the change, not of the product."""
    inputs, a, b = (torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    other = a + 1e-3 * torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        replay = Replay({})
        with replay:
            first = F.linear(F.linear(inputs, a), b)
        replay.exchange(a, other)
        with replay:
            second = F.linear(F.linear(inputs, other), b)
    expected = inputs.double() @ (other - a).double().T @ b.double().T
    assert float((second - first - expected).norm()) <= 0.01 * float(expected.norm())


def test_a_tensor_as_it_was_before_a_change_in_place_is_not_made_up() -> None:
    def changing(a: Tensor, b: Tensor) -> Tensor:
        first = F.linear(X, a)
        second = F.linear(first, b)
        first.view(-1).mul_(2)
        return F.linear(first, b) + second

    with torch.inference_mode():
        replay = Replay({})
        with replay:
            first = changing(A, B)
        with replay:
            torch.testing.assert_close(changing(A + 1, B), changing(A + 1, B))
        with pytest.raises(ReplayError), replay:
            changing(A, B + 1)
        with replay:
            assert changing(A, B) is first
