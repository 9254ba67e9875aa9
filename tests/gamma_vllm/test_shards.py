"""The shard table: shapes, tensor parallelism, merging."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from gamma_vllm.shards import PARTS, CheckpointModule, LayerGeometry, merge, plan_shards, windows


def module(name, rows, columns, num_bits, group_size=32, symmetric=True):
    if num_bits == 16:
        return CheckpointModule(name, ModuleFormat(shape=(rows, columns), num_bits=16))
    declared = ModuleFormat(shape=(rows, columns), num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    return CheckpointModule(name, declared)


def column(rows, columns, rank=0, size=1, copies=None):
    """Geometry of a column-parallel layer whose shards have `rows` rows on each rank."""
    return LayerGeometry(
        "layer", columns, sum(rows) * size, columns, tuple(rows), rank, size, copies or (1,) * len(rows)
    )


QKV = [module("q", 64, 64, 4), module("k", 32, 64, 3, 32, False), module("v", 32, 64, 16)]


def test_shards_of_one_layer_keep_their_own_widths():
    shards = plan_shards(QKV, column([64, 32, 32], 64))
    assert [s.shape("weight_packed") for s in shards] == [(64, 8), (32, 6), None]
    assert [s.shape("weight_scale") for s in shards] == [(64, 2), (32, 2), None]
    assert [s.shape("weight_zero_point") for s in shards] == [None, (3, 2), None]
    assert [s.shape("weight") for s in shards] == [None, None, (32, 64)]
    assert {i: w.offset for i, w in windows(shards, "weight_packed").items()} == {0: 0, 1: 512}


@pytest.mark.parametrize("rank", range(4))
def test_kv_heads_are_replicated_when_ranks_outnumber_them(rank):
    shards = plan_shards(QKV, column([16, 16, 16], 64, rank, 4, (1, 2, 2)))
    assert [s.row_start for s in shards] == [16 * rank, 16 * (rank // 2), 16 * (rank // 2)]


@pytest.mark.parametrize("rank", range(2))
def test_row_parallel_layers_split_columns(rank):
    geometry = LayerGeometry("layer", 128, 48, 64, (48,), rank, 2, (1,))
    (shard,) = plan_shards([module("down", 48, 128, 5, 64, False)], geometry)
    assert (shard.row_start, shard.rows, shard.column_start, shard.columns) == (0, 48, 64 * rank, 64)
    assert shard.shape("weight_packed") == (48, 10)
    assert shard.shape("weight_zero_point") == (8, 1)


def test_replicated_layers_ignore_the_rank():
    geometry = LayerGeometry("layer", 64, 48, 64, (48,), 3, 4, (1,))
    (shard,) = plan_shards([module("gate", 48, 64, 5)], geometry)
    assert (shard.row_start, shard.rows, shard.column_start, shard.columns) == (0, 48, 0, 64)


def test_tensor_parallel_size_that_cuts_a_group_is_refused_with_those_that_do_not():
    geometry = LayerGeometry("layer", 352, 128, 176, (128,), 0, 2, (1,))
    with pytest.raises(ContractError, match=r"down: tensor_parallel_size 2 .* 176 of 352 .* \[1, 11\]"):
        plan_shards([module("down", 128, 352, 4)], geometry)


def test_sixteen_bit_shards_split_anywhere():
    geometry = LayerGeometry("layer", 172, 64, 86, (64,), 1, 2, (1,))
    (shard,) = plan_shards([module("down", 64, 172, 16)], geometry)
    assert (shard.column_start, shard.columns) == (86, 86)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([module("q", 64, 96, 4), *QKV[1:]], r"q: .*\[64, 96\].* in_features 64"),
        ([module("q", 96, 64, 4), *QKV[1:]], r"q: .*\[96, 64\].* 64 output rows"),
        ([QKV[0], module("k", 16, 64, 3), QKV[2]], r"k: .*\[16, 64\].* 32 output rows"),
        (QKV[:2], r"q, k have 2 of its 3 shards"),
        ([*QKV, module("more", 8, 64, 4)], r"more: .*\[8, 64\].* 0 output rows"),
    ],
)
def test_shapes_that_contradict_the_layer_name_the_module_and_both_values(modules, message):
    with pytest.raises(ContractError, match=message):
        plan_shards(modules, column([64, 32, 32], 64))


def test_one_module_may_cover_all_shards_of_a_layer():
    shards = plan_shards([module("qkv", 128, 64, 4)], column([32, 16, 16], 64, 1, 2))
    assert [s.row_start for s in shards] == [32, 64 + 16, 96 + 16]
    assert list(windows(shards, "weight_shape")) == [0]
    assert [s.rows for s in merge(shards)] == [64]


def test_neighbours_of_one_kind_share_a_gemm_and_others_do_not():
    kinds = [(4, 32, True), (4, 32, True), (4, 64, True), (4, 64, False), (16, 32, True), (16, 32, True)]
    modules = [module(f"m{i}", 32, 64, *kind) for i, kind in enumerate(kinds)]
    segments = merge(plan_shards(modules, column([32] * 6, 64)))
    assert [s.shards for s in segments] == [(0, 1), (2,), (3,), (4, 5)]
    assert [s.rows for s in segments] == [64, 32, 32, 64]


_SHARDS = st.lists(
    st.tuples(
        st.integers(1, 70),
        st.sampled_from([2, 3, 4, 5, 6, 8, 16]),
        st.sampled_from([32, 64, 128]),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@given(_SHARDS, st.sampled_from([128, 384]), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_windows_and_segments_tile_the_layer(kinds, columns, size, rank):
    modules = [module(f"m{i}", rows * size, columns, *kind) for i, (rows, *kind) in enumerate(kinds)]
    shards = plan_shards(modules, column([rows for rows, *_ in kinds], columns, rank % size, size))
    for part in PARTS:
        end = 0
        for window in windows(shards, part).values():
            assert window.offset == end
            end += math.prod(window.shape)
    segments = merge(shards)
    assert [i for s in segments for i in s.shards] == list(range(len(shards)))
    assert sum(s.rows for s in segments) == sum(rows for rows, *_ in kinds)
    kinds_in_order = [(s.num_bits, s.group_size, s.symmetric) for s in segments]
    assert all(a != b for a, b in itertools.pairwise(kinds_in_order))
