"""Tables fit a terminal of 80 columns and say without colour what they say with it."""

import io
import json

import pytest
from rich.console import Console

from allocator.contract.layout import WIDTHS, ModuleFormat
from allocator.model import read_inventory
from allocator.report.tables import bytes_table, inventory_table, widths_table

LINEARS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def render(renderable) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, force_terminal=False, color_system=None).print(renderable)
    return stream.getvalue()


def large_model(folder, blocks=64, hidden=8192, ffn=28672, vocab=151936):
    """A 64-block model whose weights are a hole in a sparse file."""
    q, kv = (hidden, hidden), (1024, hidden)
    linears = dict(zip(LINEARS, [q, kv, kv, q, (ffn, hidden), (ffn, hidden), (hidden, ffn)], strict=True))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for i in range(blocks):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocab,
        "num_hidden_layers": blocks, "num_attention_heads": 64, "num_key_value_heads": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return read_inventory(folder)


def test_inventory_of_a_large_model_fits_80_columns_and_names_the_range(tmp_path):
    inventory = large_model(tmp_path)
    text = render(inventory_table(inventory, WIDTHS, 128, symmetric=False))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 30
    smallest, largest = inventory.feasible_bytes(WIDTHS, 128, symmetric=False)
    assert f"{smallest:,} to {largest:,} bytes" in text
    assert "…" not in text
    row = next(line for line in lines if line.strip().startswith("gate"))
    assert row.split()[1:3] == ["64", "28672x8192"]
    assert float(row.split()[-1]) == 64 * 28672 * 8192 * 2 / 2**20
    assert "self_attn.qkv_proj = q, k, v" in text
    row = next(line for line in lines if line.strip().startswith("lm_head"))
    assert float(row.split()[-1]) == 151936 * 8192 * 2 / 2**20
    assert "-" not in row.split()[3:]


def form(bits: int) -> ModuleFormat:
    extra = {} if bits == 16 else {"group_size": 32, "symmetric": True}
    return ModuleFormat(shape=(64, 64), num_bits=bits, **extra)


def test_widths_of_64_different_blocks_fit_80_columns():
    modules = {
        f"model.layers.{i}.{name}": form(WIDTHS[(i + j) % 7]) for i in range(64) for j, name in enumerate(LINEARS)
    }
    text = render(widths_table(modules | {"model.embed_tokens": form(16), "lm_head": form(16)}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split() and line.split()[0].isdigit()}
    assert len(rows) == 64
    assert rows["63"] == [str(WIDTHS[(63 + j) % 7]) for j in range(7)]
    assert "model.embed_tokens 16, lm_head 16" in text


def test_neighbouring_blocks_of_equal_widths_share_a_row_and_others_do_not():
    modules = {f"model.layers.{i}.{name}": form(2 if i == 5 else 4) for i in range(10) for name in LINEARS}
    labels = [line.split()[0] for line in render(widths_table(modules)).splitlines() if " 2 " in line or " 4 " in line]
    assert labels == ["0-4", "5", "6-9"]


def test_module_that_a_block_lacks_is_a_dash():
    modules = {"model.layers.0.a": form(2), "model.layers.1.b": form(3)}
    rows = [line.split() for line in render(widths_table(modules)).splitlines()]
    assert ["0", "2", "-"] in rows
    assert ["1", "-", "3"] in rows


@pytest.mark.parametrize(("measured", "shown"), [(1000, "0"), (1001, "+1"), (900, "-100")])
def test_difference_between_predicted_and_written_bytes_is_shown_in_words(measured, shown):
    text = render(bytes_table([("model.safetensors", 1000, measured)]))
    row = next(line.split() for line in text.splitlines() if "model.safetensors" in line)
    assert row == ["model.safetensors", "1,000", f"{measured:,}", shown]


def test_prediction_alone_has_no_empty_columns():
    text = render(bytes_table([("all tensors", 2**40, None)]))
    assert "written" not in text
    assert f"{2**40:,}" in text
