"""Solving for what a rank holds after loading: never a byte over, best by brute force, told apart in the manifest."""

import itertools
import json
import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.contract.errors import ContractError, InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.resident import Heads, Kernel, Residency, Stage
from allocator.solve import Rules, SolveSettings, solve_resident
from tests.solve.conftest import build_scores

NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
SHAPES = {"q": (256, 128), "k": (64, 128), "v": (64, 128), "o": (128, 256), "down": (128, 512)}


def residency(ranks=1, stages=1, kernel="torch", blocks=2):
    each = blocks // stages
    parts = [Stage(first_block=i * each, last_block=(i + 1) * each - 1, other_bytes=1000) for i in range(stages)]
    splits = {
        f"model.layers.*.self_attn.{p}_proj": s for p, s in zip("qkvo", ["column", "kv", "kv", "row"], strict=True)
    }
    return Residency(
        kernel=kernel,
        tensor_parallel_size=ranks,
        expert_parallel=False,
        heads=Heads(query=8, key_value=2, size=32),
        stages=parts,
        splits=splits | {"model.layers.*.mlp.down_proj": "row", "model.embed_tokens": "embedding", "lm_head": "head"},
        fused={f"model.layers.*.self_attn.{p}_proj": "qkv_proj" for p in "qkv"},
    )


def scores_of(draw, blocks=2, widths=(2, 4, 16)):
    modules = {"model.embed_tokens": ((96, 128), {16: 0.0})}
    for i, name in itertools.product(range(blocks), NAMES):
        shape = SHAPES[name.rpartition(".")[2].removesuffix("_proj")]
        modules[f"model.layers.{i}.{name}"] = (shape, {b: draw() / b for b in widths})
    return build_scores(modules | {"lm_head": ((96, 128), {16: 0.0})}, other_bytes=77)


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.floats(0.1, 100), min_size=15, max_size=15), share=st.floats(0, 1),
    ranks=st.sampled_from([1, 2, 4]), kernel=st.sampled_from(get_args(Kernel)),
)  # fmt: skip
def test_best_assignment_is_that_of_brute_force(scores, share, ranks, kernel):
    drawn = iter(scores)
    given_scores, where = scores_of(lambda: next(drawn), blocks=1), residency(ranks, kernel=kernel, blocks=1)
    free = {n: m.candidates for n, m in given_scores.modules.items() if len(m.candidates) > 1}
    fixed = 1000 + sum(
        where.module_bytes(n, m.candidates[0].format) for n, m in given_scores.modules.items() if n not in free
    )
    sizes = {n: [where.module_bytes(n, c.format) for c in cs] for n, cs in free.items()}
    least, most = fixed + sum(map(min, sizes.values())), fixed + sum(map(max, sizes.values()))
    budget = int(least + share * (most - least))
    best = math.inf
    for picks in itertools.product(range(3), repeat=len(free)):
        if fixed + sum(sizes[n][j] for n, j in zip(free, picks, strict=True)) <= budget:
            best = min(best, sum(free[n][j].score for n, j in zip(free, picks, strict=True)))
    manifest = solve_resident(given_scores, SolveSettings(), where, budget, "test")
    assert manifest.proof.objective <= best + 1e-9  # packing neighbours together can leave room for more
    assert manifest.budget.kind == "resident"
    assert manifest.budget.resident_bytes == max(where.stage_bytes(manifest.modules)) <= budget


def test_each_pipeline_stage_keeps_the_budget_of_its_ranks(make_scores):
    numbers = iter(range(1, 100))
    scores = scores_of(lambda: float(next(numbers)))
    where = residency(stages=2)
    budget = 130_000
    manifest = solve_resident(scores, SolveSettings(), where, budget, "test")
    stages = where.stage_bytes(manifest.modules)
    assert max(stages) <= budget
    assert min(stages) > 0.9 * budget  # both are filled
    pinned = SolveSettings(rules=Rules({"*.layers.1.mlp.down_proj": 4}))
    held = solve_resident(scores, pinned, where, budget, "test").modules["model.layers.1.mlp.down_proj"]
    assert held.num_bits == 4
    with pytest.raises(InputError, match="matches no module"):
        solve_resident(scores, SolveSettings(rules=Rules({"nothing": 4})), where, budget, "test")


def test_budget_that_no_assignment_meets_is_refused_with_the_least(make_scores):
    scores = scores_of(lambda: 1.0)
    with pytest.raises(InfeasibleBudgetError, match=r"on each rank, budget .* is below the smallest assignment"):
        solve_resident(scores, SolveSettings(), residency(), 50_000, "test")
    splits = {name: split for name, split in residency().splits.items() if name != "lm_head"}
    other = residency().model_copy(update={"splits": splits})
    with pytest.raises(InputError, match="lm_head: the plan has no such module"):
        solve_resident(scores, SolveSettings(), other, 10**6, "test")


def test_manifest_of_a_resident_budget_is_read_again_and_checked(tmp_path):
    manifest = solve_resident(scores_of(lambda: 1.0), SolveSettings(), residency(2), 130_000, "plan for a card")
    path = tmp_path / "manifest.json"
    manifest.write(path)
    assert Manifest.read(path) == manifest
    document = json.loads(path.read_text())
    document["budget"]["resident_bytes"] = document["budget"]["nbytes"] + 1
    with pytest.raises(ContractError, match="over the budget of 130000"):
        Manifest.parse(document, "changed")
    del document["budget"]["kind"]
    with pytest.raises(ContractError, match="resident_bytes stand in a budget of kind resident"):
        Manifest.parse(document, "changed")
