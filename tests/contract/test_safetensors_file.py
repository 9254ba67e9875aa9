"""File sizes are predicted to the byte, and a damaged file is refused before a weight is read."""

import json
import struct

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from allocator.contract.errors import ContractError
from allocator.contract.layout import TensorSpec
from allocator.contract.safetensors_file import (
    INDEX_NAME,
    predict_file_bytes,
    read_folder_headers,
    read_header,
    serialized_order,
)

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
tensor_sets = st.dictionaries(
    names,
    st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=12,
)


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@settings(deadline=None, max_examples=80)
@given(tensor_sets)
def test_predicted_size_and_order_are_those_of_the_library(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("sizes") / "model.safetensors"
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    real = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    save_file(real, path, metadata={"format": "pt"})
    assert predict_file_bytes(specs) == path.stat().st_size
    found = read_header(path)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {t.name: (t.dtype, t.shape) for t in specs}
    assert [t.name for t in serialized_order(specs)] == list(found)


def test_bytes_are_found_where_the_header_says(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5, dtype=torch.int32), "b": torch.ones(3, dtype=torch.float64)}, path)
    tensor = read_header(path)["a"]
    assert path.read_bytes()[tensor.start : tensor.start + tensor.nbytes] == struct.pack("<5i", *range(5))


ENTRY = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}
DAMAGED = {
    "cut short": ({"a": ENTRY}, b"123", "its header says"),
    "bytes behind the end": ({"a": ENTRY}, b"12345", "its header says"),
    "a hole": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [5, 9]}}, b"123456789", "b starts at byte"),
    "an overlap": ({"a": ENTRY, "b": ENTRY}, b"1234", "b starts at byte"),
    "unknown dtype": ({"a": ENTRY | {"dtype": "I7"}}, b"1234", "tensor a"),
    "negative dimension": ({"a": ENTRY | {"shape": [-4]}}, b"1234", "tensor a"),
    "offsets that are no integers": ({"a": ENTRY | {"data_offsets": [0.0, 4.0]}}, b"1234", "tensor a"),
    "shape against offsets": ({"a": ENTRY | {"shape": [3]}}, b"1234", "tensor a"),
    "entry without dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234", "tensor a"),
    "a tensor twice": (b'{"a":1,"a":2}', b"", "'a' stands twice"),
    "a header that is a list": (b"[]", b"", "no JSON object"),
    "a header that is no JSON": (b'{"a":', b"", "not valid JSON"),
    "a header that is no text": (b"\xff\xfe", b"", "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused(tmp_path, damage):
    header, data, message = DAMAGED[damage]
    write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ContractError, match=message):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}"])
def test_file_shorter_than_its_header_is_refused_without_reading_it(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ContractError, match="too few for its header"):
        read_header(tmp_path / "x.safetensors")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_and_never_crash(tmp_path_factory, content, framed):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content if framed else content)
    assume(content.strip() != b"{}" or not framed)
    with pytest.raises(ContractError, match=r"x\.safetensors"):
        read_header(path)


def indexed_folder(folder):
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return index


def test_sharded_folder_is_read_through_its_index(tmp_path):
    indexed_folder(tmp_path)
    assert {n: t.path.name for n, t in read_folder_headers(tmp_path).items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "x": "model-1.safetensors"}, "tensor x is in the index"),
        ({"a": "model-1.safetensors", "b": "model-9.safetensors"}, "model-9.safetensors: no such file"),
        ({"a": "../model-1.safetensors"}, "no file name"),
        ({"a": 7}, "no file name"),
        (["a"], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_index_that_does_not_belong_to_the_files_is_refused(tmp_path, weight_map, message):
    indexed_folder(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ContractError, match=message):
        read_folder_headers(tmp_path)


def test_tensor_missing_from_the_index_is_refused(tmp_path):
    indexed_folder(tmp_path)
    save_file({"b": torch.zeros(3), "c": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ContractError, match="tensor c is in the index or in the files, but not in both"):
        read_folder_headers(tmp_path)


def test_tensor_that_stands_in_two_files_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ContractError, match=r"tensor a stands in one\.safetensors and two\.safetensors"):
        read_folder_headers(tmp_path)
