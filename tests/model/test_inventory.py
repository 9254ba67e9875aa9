"""What is in a model is found from headers alone, and a model that contradicts its config is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.blocks.tensors import read_rows, read_tensor
from allocator.contract.errors import ContractError, GammaError, InputError
from allocator.contract.layout import WIDTHS, module_bytes
from allocator.model import model_digest, read_inventory

ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_a_module_or_copied_and_no_byte_is_lost(make_model, architecture):
    folder = make_model(architecture)
    inventory = read_inventory(folder)
    stored = load_file(folder / "model.safetensors")
    found = [m.tensor.name for m in inventory.modules] + [t.name for t in inventory.others]
    assert sorted(found) == sorted(stored)
    assert inventory.other_bytes + sum(m.tensor.nbytes for m in inventory.modules) == sum(
        t.nbytes for t in stored.values()
    )
    assert all(stored[m.tensor.name].ndim == 2 for m in inventory.modules)
    assert (inventory.architecture, inventory.blocks, inventory.tied) == (architecture, 2, False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_stand_in_model_order_with_their_fused_groups(make_model, architecture):
    inventory = read_inventory(make_model(architecture))
    names = [m.name for m in inventory.modules]
    assert names[0] == "model.embed_tokens"
    assert names[-1] == "lm_head"
    assert [m.block for m in inventory.modules] == [None, *[0] * 7, *[1] * 7, None]
    assert inventory.fused_groups["model.layers.1.self_attn.qkv_proj"] == tuple(
        f"model.layers.1.self_attn.{p}_proj" for p in "qkv"
    )
    assert inventory.fused_groups["model.layers.0.mlp.gate_up_proj"] == (
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    )
    assert {m.name for m in inventory.modules if m.fused_group is None and m.role == "linear"} == {
        f"model.layers.{i}.{p}" for i in range(2) for p in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_biases_and_norms_are_copied(make_model):
    copied = {t.name for t in read_inventory(make_model("Qwen2ForCausalLM")).others}
    assert "model.layers.0.self_attn.k_proj.bias" in copied
    assert "model.norm.weight" in copied


def test_formats_hold_every_width_and_16_bits_alone_where_nothing_else_can_be_served(make_model):
    inventory = read_inventory(make_model(intermediate_size=80))
    by_name = {m.name: m for m in inventory.modules}
    linear = inventory.formats(by_name[QUERY], WIDTHS, 128, symmetric=False)
    assert [f.num_bits for f in linear] == [2, 3, 4, 5, 6, 8, 16]
    assert {f.group_size for f in linear if f.quantized} == {64}
    assert [f.num_bits for f in inventory.formats(by_name[QUERY], [4], 128, symmetric=True)] == [4, 16]
    for name in ("model.embed_tokens", "lm_head"):
        assert [f.num_bits for f in inventory.formats(by_name[name], WIDTHS, 64, symmetric=True)] == list(WIDTHS)
    down = by_name["model.layers.0.mlp.down_proj"]
    assert [f.num_bits for f in inventory.formats(down, WIDTHS, 128, symmetric=True)] == [16]
    assert "in_features 80 is no multiple of 32" in down.why_16


def test_feasible_bytes_are_the_sums_of_the_narrowest_and_the_widest(make_model):
    inventory = read_inventory(make_model())
    smallest, largest = inventory.feasible_bytes([3, 8], 64, symmetric=False)
    formats = [inventory.formats(m, [3, 8], 64, symmetric=False) for m in inventory.modules]
    assert smallest == inventory.other_bytes + sum(module_bytes(f[0]) for f in formats)
    assert largest == sum(t.nbytes for t in load_file(inventory.folder / "model.safetensors").values())


def test_widths_and_group_sizes_that_do_not_exist_are_refused(make_model):
    inventory = read_inventory(make_model())
    with pytest.raises(InputError, match=r"widths \[7\] do not exist; allowed are \[2, 3, 4, 5, 6, 8, 16\]"):
        inventory.formats(inventory.modules[1], [4, 7], 64, symmetric=True)
    with pytest.raises(InputError, match=r"group size 100 does not exist; allowed are \[32, 64, 128\]"):
        inventory.formats(inventory.modules[1], [4], 100, symmetric=True)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "BF16")]
)
def test_16_bit_dtype_is_that_of_the_source_or_bf16(make_model, dtype, stored):
    assert read_inventory(make_model(dtype=dtype)).dtype == stored


def test_tied_head_is_no_module_and_its_second_copy_is_dropped(make_model):
    once = read_inventory(make_model(tie_word_embeddings=True))
    twice = read_inventory(
        make_model(tie_word_embeddings=True, spoil=lambda c, t: t.update({"lm_head.weight": torch.zeros(50, 64)}))
    )
    assert once.tied
    assert once.modules[-1].role == "linear"
    assert [t.name for t in twice.dropped] == ["lm_head.weight"]
    assert twice.other_bytes == once.other_bytes
    assert model_digest(twice) == model_digest(once)


def test_config_keys_left_out_take_the_value_of_the_hugging_face_class(make_model):
    llama = make_model(
        num_key_value_heads=4, head_dim=16, spoil=lambda c, t: (c.pop("head_dim"), c.pop("num_key_value_heads"))
    )
    assert read_inventory(llama).module(QUERY).shape == (64, 64)
    qwen3 = make_model("Qwen3ForCausalLM", head_dim=128, spoil=lambda c, t: c.pop("head_dim"))
    assert read_inventory(qwen3).module(QUERY).shape == (512, 64)


REFUSED = {
    "unknown architecture": (
        lambda c, t: c.update(architectures=["GPT2LMHeadModel"]),
        "'GPT2LMHeadModel' is not known: .* not one row of hidden_size a token; docs/models.md lists the .* that are",
    ),
    "no architecture": (lambda c, t: c.pop("architectures"), "architecture None is not known"),
    "already quantized": (
        lambda c, t: c.update(quantization_config={"quant_method": "awq"}),
        "already quantized .*quant_method 'awq'",
    ),
    "tensor missing": (lambda c, t: t.pop(f"{QUERY}.weight"), rf"{QUERY}.weight .*\[128, 64\]\) is missing"),
    "norm missing": (lambda c, t: t.pop("model.norm.weight"), "model.norm.weight .* is missing"),
    "head missing": (lambda c, t: t.pop("lm_head.weight"), "lm_head.weight .* missing .*tie_word_embeddings"),
    "hidden_size": (
        lambda c, t: c.update(hidden_size=128),
        r"model.embed_tokens.weight has shape \[50, 64\], config.json says \[50, 128\] \(vocab_size, hidden_size\)",
    ),
    "vocab_size": (lambda c, t: c.update(vocab_size=51), r"embed_tokens.weight has shape \[50, 64\].*\[51, 64\]"),
    "intermediate_size": (
        lambda c, t: c.update(intermediate_size=128),
        r"layers.0.mlp.gate_proj.weight has shape \[96, 64\].*\[128, 64\]",
    ),
    "heads": (
        lambda c, t: c.update(num_attention_heads=8),
        r"q_proj.weight has shape \[128, 64\].*\[256, 64\] \(num_attention_heads\*head_dim",
    ),
    "kv heads": (
        lambda c, t: c.update(num_key_value_heads=1),
        r"layers.0.self_attn.k_proj.weight has shape \[64, 64\].*\[32, 64\]",
    ),
    "head_dim": (lambda c, t: c.update(head_dim=16), r"q_proj.weight has shape \[128, 64\].*\[64, 64\]"),
    "too few blocks": (
        lambda c, t: c.update(num_hidden_layers=3),
        "model.layers.2.self_attn.q_proj.weight .* is missing",
    ),
    "too many blocks": (
        lambda c, t: c.update(num_hidden_layers=1),
        "is of block 1, but num_hidden_layers in config.json is 1",
    ),
    "dtype": (
        lambda c, t: t.update({f"{QUERY}.weight": torch.zeros(128, 64, dtype=torch.int8)}),
        f"{QUERY}.weight has dtype I8, allowed are BF16, F16, F32",
    ),
    "two 16-bit dtypes": (
        lambda c, t: t.update({f"{QUERY}.weight": torch.zeros(128, 64, dtype=torch.float16)}),
        f"is BF16 and {QUERY} is F16",
    ),
    "size as text": (lambda c, t: c.update(hidden_size="64"), "hidden_size must be a positive integer, given '64'"),
    "size missing": (lambda c, t: c.pop("vocab_size"), "vocab_size must be a positive integer, given 'nothing'"),
    "tied as text": (lambda c, t: c.update(tie_word_embeddings="no"), "must be true or false, given 'no'"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unusable_model_is_refused_naming_both_values(make_model, reason):
    spoil, message = REFUSED[reason]
    with pytest.raises(InputError, match=message):
        read_inventory(make_model(spoil=spoil))


def test_bias_that_the_config_promises_must_be_there(make_model):
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj.bias \(shape \[128\]\) is missing"):
        read_inventory(make_model(attention_bias=True))


def test_folders_that_are_no_models_are_refused_with_what_to_do(make_model, tmp_path):
    with pytest.raises(InputError, match="no such folder; download the model first"):
        read_inventory(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no config\.json"):
        read_inventory(tmp_path)
    folder = make_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no safetensors files, only pytorch_model\.bin; convert the model"):
        read_inventory(folder)


def test_second_safetensors_file_without_an_index_is_refused(make_model):
    folder = make_model()
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"2 safetensors files .*adapter_model.safetensors"):
        read_inventory(folder)


def test_damaged_files_are_refused(make_model):
    folder = make_model()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ContractError, match="cut short"):
        read_inventory(folder)
    (folder / "config.json").write_text('{"architectures": ')
    with pytest.raises(GammaError, match=r"config\.json: not valid JSON"):
        read_inventory(folder)


def test_digest_sees_weights_and_config_and_not_how_the_model_is_stored(make_model):
    digest = model_digest(read_inventory(make_model()))
    assert digest == model_digest(read_inventory(make_model(transformers_version="9", _name_or_path="x")))
    assert digest != model_digest(read_inventory(make_model(rope_theta=5.0)))
    changed = make_model(spoil=lambda c, t: t["model.norm.weight"].add_(1))
    assert digest != model_digest(read_inventory(changed))

    sharded = make_model()
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, sharded / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert digest == model_digest(read_inventory(sharded))


def test_digest_reports_progress_up_to_the_last_byte(make_model):
    inventory, calls = read_inventory(make_model()), []
    model_digest(inventory, lambda done, total: calls.append((done, total)))
    total = sum(t.nbytes for t in load_file(inventory.folder / "model.safetensors").values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def bytes_read():
    """By this process so far, from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_of_a_large_model_headers_alone_are_read(tmp_path):
    """80 blocks of a 70-billion-parameter model, as sparse files: only headers are on the disk."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    q, kv, ffn = (8192, 8192), (1024, 8192), (28672, 8192)
    linears = {"self_attn.q": q, "self_attn.k": kv, "self_attn.v": kv, "self_attn.o": q}
    linears |= {"mlp.gate": ffn, "mlp.up": ffn, "mlp.down": ffn[::-1]}
    shapes = {"model.embed_tokens.weight": (128256, 8192), "lm_head.weight": (128256, 8192)}
    shapes["model.norm.weight"] = (8192,)
    for i in range(80):
        shapes |= {f"model.layers.{i}.{n}_proj.weight": s for n, s in linears.items()}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (8192,) for n in ("input", "post_attention")}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = bytes_read()
    inventory = read_inventory(tmp_path)
    assert bytes_read() - before < 1 << 20  # of 141 GB
    assert sum(m.parameters for m in inventory.modules) == 70_552_387_584


def test_reading_a_model_imports_no_torch(make_model):
    code = (
        "import sys; from pathlib import Path; from allocator.model import model_digest, read_inventory;"
        f"model_digest(read_inventory(Path({str(make_model())!r}))); print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["ref-7m", "babyllama105", "stories260K"])
def test_trained_models_are_understood(name, trained_model):
    inventory = read_inventory(trained_model(name))
    smallest, largest = inventory.feasible_bytes(WIDTHS, 128, symmetric=True)
    assert len(inventory.modules) == 1 + 7 * inventory.blocks
    assert inventory.tied
    assert 0 < smallest < largest
    assert inventory.dtype == "BF16"


def test_a_model_saved_without_its_head_is_read_by_the_architectures_names(make_model):
    whole = read_inventory(make_model("Qwen3ForCausalLM", tie_word_embeddings=True))

    def strip(_config, tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    bare = read_inventory(make_model("Qwen3ForCausalLM", spoil=strip, tie_word_embeddings=True))
    assert [m.name for m in bare.modules] == [m.name for m in whole.modules]
    assert model_digest(bare) == model_digest(whole)
    assert bare.prefix == "model."
    assert whole.prefix is None
    assert any("named without 'model.'" in line for line in bare.told())
    for module, same in zip(bare.modules, whole.modules, strict=True):
        assert torch.equal(read_tensor(module.tensor), read_tensor(same.tensor))
        assert torch.equal(read_rows(module.tensor, slice(3, 9)), read_rows(same.tensor, slice(3, 9)))


@pytest.mark.parametrize(("declared", "kept"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "BF16")])
def test_float16_beside_float32_is_kept_as_config_json_says_and_rounding_is_told(make_model, declared, kept):
    def mix(_config, tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float16 if "mlp" in name else torch.float32)

    inventory = read_inventory(make_model(spoil=mix, torch_dtype=declared))
    assert inventory.dtype == kept
    told = "\n".join(inventory.told())
    assert f"rounded from F32 to {kept}" in told
    assert ("rounded from F16 to BF16" in told) == (kept == "BF16")
    assert "model.layers.*.self_attn.q_proj (2)" in told


def test_tensors_that_the_architecture_does_not_have_are_carried_and_named(make_model):
    def add(_config, tensors):
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(16)

    inventory = read_inventory(make_model(spoil=add))
    assert len(inventory.unknown) == 2
    assert set(inventory.unknown) <= {tensor.name for tensor in inventory.others}
    (line,) = inventory.told()
    assert line.startswith(
        "copied, though LlamaForCausalLM has no such tensors: model.layers.*.self_attn.rotary_emb.inv"
    )
    assert read_inventory(make_model()).told() == []


@pytest.mark.parametrize("prefix", ["mtp.", "model.layers.2."])
def test_layers_that_predict_further_tokens_are_copied_and_their_bytes_told(make_model, prefix):
    def add(config, tensors):
        config["num_nextn_predict_layers"] = 1
        tensors[f"{prefix}fc.weight"] = torch.zeros(4, 8, dtype=torch.bfloat16)

    inventory = read_inventory(make_model(spoil=add))
    assert inventory.predicting_bytes == 64
    assert inventory.other_bytes == read_inventory(make_model()).other_bytes + 64
    (line,) = inventory.told()
    assert line.startswith("copied, 64 bytes, to predict further tokens")
    assert read_inventory(make_model()).predicting_bytes is None
