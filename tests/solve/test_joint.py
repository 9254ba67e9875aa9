"""KV cache and weights out of one budget: the pair of least total loss, as brute force finds it."""

import itertools
import math
import random

import pytest

from allocator.contract.errors import ContractError, InfeasibleBudgetError
from allocator.contract.scores import KvCacheScores
from allocator.solve import make_manifest, solve
from allocator.solve.kv_cache_dtype import check_kv_scores, choose_kv_cache, kv_losses

WIDTHS = (2, 4, 8)
DIGESTS = ["sha256:" + letter * 64 for letter in "0a"]


def measured(losses, digest=DIGESTS[0]):
    model = {"name": "m", "architecture": "LlamaForCausalLM", "digest": digest}
    return KvCacheScores(model=model, unit="nats", calibration_digest=DIGESTS[0], tokens=10, losses=losses)


def brute_force(scores, memory, kv_bytes, losses):
    """The least total loss over every KV cache dtype and every assignment within `memory`."""
    best = math.inf
    for dtype, loss in losses.items():
        for choice in itertools.product(*(m.candidates for m in scores.modules.values())):
            if scores.other_bytes + sum(c.nbytes for c in choice) + kv_bytes[dtype] <= memory:
                best = min(best, loss + math.fsum(c.score for c in choice))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_that_of_brute_force(make_scores, seed):
    draw = random.Random(seed)
    modules = {
        f"m{i}": ((draw.randint(4, 40), 32), {b: draw.uniform(0.5, 2) * 4.0**-b for b in WIDTHS}) for i in range(5)
    }
    scores = make_scores(modules, 50)
    kv = draw.randint(200, 3000)
    kv_bytes = {"auto": 2 * kv, "fp8": kv}
    losses = kv_losses(measured({"fp8": draw.choice([1e-4, 1e-2, 5e-2, 1.0])}))
    low, high = scores.feasible_bytes()
    memory = draw.randint(low + kv, high + 2 * kv)

    def best_in(dtype):
        budget = memory - kv_bytes[dtype]
        return make_manifest(scores, solve(scores, budget), dtype, budget)

    chosen, options = choose_kv_cache(losses, best_in)
    assert chosen.total_loss == pytest.approx(brute_force(scores, memory, kv_bytes, losses), rel=1e-9)
    assert [o.dtype for o in options] == ["auto", "fp8"]
    assert chosen.manifest.tensor_bytes + kv_bytes[chosen.dtype] <= memory


def test_a_free_kv_cache_is_taken_and_a_dear_one_is_not(make_scores):
    scores = make_scores({"a": ((40, 32), {2: 0.5, 8: 0.0})})
    budgets = dict(zip(("auto", "fp8"), scores.feasible_bytes(), strict=True))  # only fp8 leaves room for 8 bits

    def best_in(dtype):
        return make_manifest(scores, solve(scores, budgets[dtype]), dtype, budgets[dtype])

    assert choose_kv_cache(kv_losses(measured({"fp8": 0.1})), best_in)[0].dtype == "fp8"
    assert choose_kv_cache(kv_losses(measured({"fp8": 0.9})), best_in)[0].dtype == "auto"
    assert choose_kv_cache(kv_losses(measured({"fp8": 0.5})), best_in)[0].dtype == "auto"  # a tie


def test_a_dtype_that_leaves_too_little_is_passed_over_and_none_is_an_error(make_scores):
    scores = make_scores({"a": ((40, 32), {2: 0.5, 8: 0.0})})
    low, _ = scores.feasible_bytes()
    budgets = {"auto": low - 1, "fp8": low}

    def best_in(dtype):
        return make_manifest(scores, solve(scores, budgets[dtype]), dtype, budgets[dtype])

    chosen, options = choose_kv_cache(kv_losses(measured({"fp8": 9.0})), best_in)
    assert chosen.dtype == "fp8"
    assert options[0].total_loss is None
    budgets["fp8"] = 1
    with pytest.raises(InfeasibleBudgetError, match=r"auto: .*fp8: "):
        choose_kv_cache(kv_losses(measured({"fp8": 9.0})), best_in)


def test_losses_of_another_model_are_refused(make_scores):
    scores = make_scores({"a": ((4, 32), {2: 0.5})})
    check_kv_scores(measured({"fp8": 1.0}), scores)
    with pytest.raises(ContractError, match=DIGESTS[1]):
        check_kv_scores(measured({"fp8": 1.0}, DIGESTS[1]), scores)
