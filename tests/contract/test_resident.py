"""The formula of bytes after loading: how ranks divide modules, what kernels pad, what cannot be divided."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.contract.errors import InputError
from allocator.contract.layout import WIDTHS, ModuleFormat, module_bytes
from allocator.contract.modules import kind_name
from allocator.contract.resident import (
    Heads,
    Kernel,
    Ranks,
    Residency,
    Stage,
    rank_shape,
    resident_bytes,
)

HEADS = Heads(query=32, key_value=8, size=64)
KERNELS = st.sampled_from(get_args(Kernel))


def formats(rows, columns):
    def make(draw):
        bits, symmetric, group = draw
        if bits == 16:
            return ModuleFormat(shape=(rows, columns), num_bits=16)
        return ModuleFormat(shape=(rows, columns), num_bits=bits, group_size=group, symmetric=symmetric)

    return st.tuples(st.sampled_from(WIDTHS), st.booleans(), st.sampled_from([32, 64, 128])).map(make)


@given(module=formats(512, 1024))
def test_one_rank_of_the_torch_kernel_holds_the_file_less_the_shape(module):
    assert resident_bytes(module, "column") == module_bytes(module) - (16 if module.quantized else 0)


@given(module=formats(2048, 1024), ranks=st.sampled_from([2, 4, 8]), split=st.sampled_from(["column", "row"]))
def test_ranks_share_a_module_evenly(module, ranks, split):
    assert resident_bytes(module, split, Ranks(ranks)) * ranks == resident_bytes(module, split)
    assert resident_bytes(module, "replicated", Ranks(ranks)) == resident_bytes(module, "replicated")


@given(parts=st.lists(st.tuples(st.integers(1, 700), formats(1, 256)), min_size=2, max_size=4), kernel=KERNELS)
def test_packing_neighbours_together_never_takes_more(parts, kernel):
    modules = {
        f"model.layers.0.self_attn.{i}": f.model_copy(update={"shape": (n, 256)}) for i, (n, f) in enumerate(parts)
    }
    where = Residency(
        kernel=kernel, tensor_parallel_size=1, expert_parallel=False, heads=HEADS,
        stages=[Stage(first_block=0, last_block=0, other_bytes=0)],
        splits={kind_name(name): "column" for name in modules},
        fused={kind_name(name): "qkv_proj" for name in modules},
    )  # fmt: skip
    (together,) = where.stage_bytes(modules)
    assert together <= sum(where.module_bytes(name, module) for name, module in modules.items())


def test_neighbours_are_those_in_vllm_whatever_the_order_of_the_manifest():
    forms = {"q": (64, 4), "k": (32, 3), "v": (32, 4)}
    modules = {
        f"model.layers.0.self_attn.{p}": ModuleFormat(shape=(n, 128), num_bits=b, group_size=32, symmetric=True)
        for p, (n, b) in forms.items()
    }
    where = Residency(
        kernel="ark", tensor_parallel_size=1, expert_parallel=False, heads=HEADS,
        stages=[Stage(first_block=0, last_block=0, other_bytes=0)],
        splits={kind_name(name): "column" for name in modules}, fused={kind_name(name): "qkv" for name in modules},
    )  # fmt: skip
    shuffled = {name: modules[name] for name in sorted(modules)}  # k, q, v: here q and v are neighbours
    assert where.stage_bytes(shuffled) == where.stage_bytes(modules)


def test_key_and_value_heads_are_divided_and_then_replicated():
    shape = (8 * 64, 2048)
    assert [rank_shape(shape, "kv", Ranks(n), HEADS)[0] for n in (1, 2, 4, 8, 16, 32)] == [512, 256, 128, 64, 64, 64]
    fused = (32 * 64 + 2 * 512, 2048)
    assert [rank_shape(fused, "qkv", Ranks(n), HEADS)[0] for n in (1, 8, 16)] == [3072, 384, 256]


def test_vocabulary_is_padded_to_64_and_divided():
    assert rank_shape((32001, 128), "head", Ranks(1)) == (32064, 128)
    assert rank_shape((32001, 128), "embedding", Ranks(4)) == (8016, 128)


def test_experts_are_cut_or_dealt_out_whole():
    assert rank_shape((768, 2048), "expert_column", Ranks(2)) == (384, 2048)
    assert rank_shape((768, 2048), "expert_column", Ranks(2, expert_parallel=True)) == (768, 2048)


def test_embedding_keeps_its_rows_and_a_tied_one_both_orders():
    module = ModuleFormat(shape=(640, 256), num_bits=4, group_size=64, symmetric=True)
    rows, blob = resident_bytes(module, "embedding", kernel="ark"), resident_bytes(module, "head", kernel="ark")
    assert rows == resident_bytes(module, "embedding", kernel="torch") < blob
    assert resident_bytes(module, "tied", kernel="ark") == rows + blob
    assert resident_bytes(module, "tied", kernel="torch") == rows


def test_ark_pads_rows_to_24_and_with_amx_to_48_whatever_cpu_plans():
    module = ModuleFormat(shape=(100, 256), num_bits=4, group_size=64, symmetric=True)
    assert resident_bytes(module, "column", kernel="ark") == 120 * (128 + 4 * 4) + 128
    assert resident_bytes(module, "column", kernel="ark-amx") == 144 * (128 + 4 * 4) + 128


def test_humming_pads_rows_to_256_and_columns_to_128():
    module = ModuleFormat(shape=(200, 96), num_bits=4, group_size=32, symmetric=True)
    assert resident_bytes(module, "column", kernel="humming") == 256 * 128 // 2 + 2 * 256 * 4
    asymmetric = module.model_copy(update={"symmetric": False, "num_bits": 5})
    assert resident_bytes(asymmetric, "column", kernel="humming") == 256 * 128 * 5 // 8 + 256 * 4 * (2 + 1)


BAD = {
    "rows": ((100, 128), "column", 3, None, "tensor_parallel_size 3 does not divide out_features 100"),
    "columns": ((128, 100), "row", 3, None, "does not divide in_features 100"),
    "group": ((128, 512), "row", 8, 128, "gives each rank 64 of 512 in_features, no multiple of group_size 128"),
    "group, smaller": ((128, 29568), "row", 4, 128, "use group_size 32 or tensor_parallel_size 1$"),
    "group, none smaller": ((128, 29568), "row", 8, 32, "or of a smaller one; use tensor_parallel_size 1, 2 or 4$"),
    "group of experts": ((128, 768), "expert_row", 4, 128, "use group_size 64 or .*or --enable-expert-parallel"),
    "rows of experts": ((100, 128), "expert_column", 8, None, "possible are 1, 2 or 4, or --enable-expert-parallel"),
    "heads": (
        (512, 128),
        "kv",
        3,
        None,
        "does not divide the 8 key and value heads.*possible are 1, 2, 4, 8, 16 or 32",
    ),
    "replicas": ((512, 128), "kv", 12, None, "no multiple of the 8 key and value heads"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_ranks_cannot_divide_is_refused_with_both_numbers(case):
    shape, split, ranks, group, message = BAD[case]
    with pytest.raises(InputError, match=message):
        rank_shape(shape, split, Ranks(ranks), HEADS, group)
