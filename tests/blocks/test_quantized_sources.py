"""A model whose files are quantized already is the 16-bit model that they stand for, from inspecting to exporting."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.blocks.hf_model import open_model
from allocator.blocks.tensors import read_rows, read_tensor
from allocator.contract.errors import ContractError, InputError
from allocator.contract.served_bank import open_served_bank
from allocator.model import model_digest, read_inventory
from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
from allocator.quantize import make_servable
from allocator.score import LearningSettings
from tests.families import make_family
from tests.quantized_sources import METHODS, quantize_experts, quantize_model

CANDIDATES = CandidateSettings(quantizer="rtn", widths=(2, 4, 16), group_size=32, sequences=2, sequence_length=16)
LEARNING = LearningSettings(draws=2, batch_tokens=64)
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_read_as_what_its_codes_and_scales_stand_for(method, tiny_model, tmp_path: Path) -> None:
    expected = quantize_model(tiny_model("llama"), tmp_path / "model", method)
    plain, inventory = read_inventory(tiny_model("llama")), read_inventory(tmp_path / "model")
    of_source, of_plain = ([(m.name, m.shape, m.dtype) for m in of.modules] for of in (inventory, plain))
    assert of_source == of_plain
    assert inventory.other_bytes == plain.other_bytes
    assert inventory.feasible_bytes((2, 16), 32, True) == plain.feasible_bytes((2, 16), 32, True)
    for tensor in inventory.tensors:
        assert torch.equal(read_tensor(tensor), expected[tensor.name]), tensor.name
    down = inventory.module("model.layers.1.mlp.down_proj").tensor
    for rows in (slice(0, 1), slice(31, 33), slice(5, 61), slice(60, 64)):
        assert torch.equal(read_rows(down, rows), expected[down.name][rows])


def test_stacked_experts_in_4_bit_floats_are_those_that_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    make_family("gpt_oss", tmp_path / "plain")
    quantize_experts(tmp_path / "plain", tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    plain, inventory = read_inventory(tmp_path / "plain"), read_inventory(tmp_path / "model")
    assert inventory.other_bytes == plain.other_bytes
    assert [t.shape for t in inventory.tensors] == [t.shape for t in plain.tensors]
    assert not inventory.unknown
    whole = open_model(tmp_path / "model").state_dict()
    for block in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            stack = f"model.layers.{block}.mlp.experts.{name}"
            expected = convert_moe_packed_tensors(stored[f"{stack}_blocks"], stored[f"{stack}_scales"])
            assert torch.equal(whole[stack], expected.float())
            for expert in range(4):
                matrix = inventory.module(stack.replace("experts.", f"experts.{expert}.")).tensor
                assert torch.equal(read_tensor(matrix), expected[expert].T)
                assert torch.equal(read_rows(matrix, slice(33, 71)), expected[expert, :, 33:71].T)


def test_stacked_experts_with_a_scale_of_each_block_are_single_matrices(tmp_path: Path) -> None:
    make_family("olmoe", tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors, expected = load_file(path), {}
    for block in (0, 1):
        parent = f"model.layers.{block}.mlp.experts"
        stacks: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(4):
            gate, up, down = (tensors.pop(f"{parent}.{expert}.{leaf}_proj.weight") for leaf in ("gate", "up", "down"))
            stacks["gate_up_proj"].append(torch.cat([gate, up]))
            stacks["down_proj"].append(down)
        for name, of_experts in stacks.items():
            codes = torch.stack(of_experts).to(torch.float8_e4m3fn)
            scale = torch.rand(4, codes.shape[1] // 32, codes.shape[2] // 32) + 0.5
            tensors |= {f"{parent}.{name}": codes, f"{parent}.{name}_scale_inv": scale}
            blocks = scale.repeat_interleave(32, 1).repeat_interleave(32, 2)
            expected[f"{parent}.{name}"] = (codes.float() * blocks).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    inventory = read_inventory(tmp_path / "model")
    parent = "model.layers.1.mlp.experts"
    up = read_tensor(inventory.module(f"{parent}.3.up_proj").tensor)
    assert torch.equal(up, expected[f"{parent}.gate_up_proj"][3, 192:])
    down = inventory.module(f"{parent}.2.down_proj").tensor
    assert torch.equal(read_rows(down, slice(30, 70)), expected[f"{parent}.down_proj"][2, 30:70])
    assert model_digest(inventory) == model_digest(read_inventory(tmp_path / "model"))


def test_the_whole_model_opens_dequantized(tiny_model, tmp_path: Path) -> None:
    expected = quantize_model(tiny_model("llama"), tmp_path / "model", "w4a16")
    found = open_model(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], expected[name].float()) for name in found)


def test_a_bank_of_it_is_served_by_exporting_only(tiny_model, tmp_path: Path) -> None:
    quantize_model(tiny_model("llama"), tmp_path / "model", "w4a16")
    make_servable(read_inventory(tmp_path / "model"), tmp_path / "bank")
    assert not list((tmp_path / "bank").glob("*.safetensors*"))  # vLLM would read the codes as weights
    assert "quantization_config" not in json.loads((tmp_path / "bank" / "config.json").read_text())


def test_what_is_learned_and_exported_is_that_of_the_dequantized_model(tiny_model, tmp_path: Path) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    expected = quantize_model(tiny_model("llama"), source, "fp8 in blocks")
    quantize_model(tiny_model("llama"), plain, "fp8 in blocks")
    save_file(expected, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    banks = {}
    for model in (source, plain):
        result = learn(model, tmp_path / f"{model.name}-work", CANDIDATES, LEARNING)
        manifest = solve_scores(result.scores, SolveSettings(average_bits=5))
        banks[model.name] = json.loads((result.bank_folder / "bank.json").read_text())
        report = export(manifest, model, result.bank_folder, tmp_path / f"{model.name}-gamma")
        assert report.written == report.predicted
        manifest.write(tmp_path / f"{model.name}.json")
    with pytest.raises(ContractError, match=r"the files of source are quantized already \(fp8\), .*gamma export"):
        open_served_bank(tmp_path / "source-work" / "bank", tmp_path / "source.json")
    assert banks["source"]["modules"] == banks["plain"]["modules"]
    assert banks["source"]["model"] == {
        "name": "source",
        "architecture": "LlamaForCausalLM",
        "digest": model_digest(read_inventory(source)),
        "quantized_by": "fp8",
    }
    gamma, other = (tmp_path / f"{name}-gamma" for name in ("source", "plain"))
    assert json.loads((gamma / "gamma_manifest.json").read_text())["model"]["quantized_by"] == "fp8"
    assert json.loads((gamma / "config.json").read_text())["quantization_config"]["quant_method"] == "gamma"
    written, same = load_file(gamma / "model.safetensors"), load_file(other / "model.safetensors")
    assert written.keys() == same.keys()
    assert all(torch.equal(written[name], same[name]) for name in same)


def test_a_changed_scale_is_another_model(tiny_model, tmp_path: Path) -> None:
    quantize_model(tiny_model("llama"), tmp_path / "model", "fp8 in blocks")
    before = model_digest(read_inventory(tmp_path / "model"))
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors[f"{QUERY}.weight_scale_inv"][0, 0] *= 2
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert model_digest(read_inventory(tmp_path / "model")) != before
    tensors[f"{QUERY}.weight"].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ContractError, match=rf"{QUERY}.weight has NaN in row 3, column 5"):
        model_digest(read_inventory(tmp_path / "model"))


def _without_scale(config, tensors):
    del tensors[f"{QUERY}.weight_scale_inv"]


def _other_blocks(config, tensors):
    config["quantization_config"]["weight_block_size"] = [128, 128]


REFUSED = {
    "no scale": ("fp8 in blocks", _without_scale, rf"{QUERY}.weight is F8_E4M3, and there is no"),
    "other blocks": ("fp8 in blocks", _other_blocks, r"weight_scale_inv has shape .* blocks of \[128, 128\]"),
    "rotated": (
        "w4a16",
        lambda c, t: c["quantization_config"].update(transform_config={"config_groups": {"R1": {}}}),
        r"its weights are rotated .*; give the original",
    ),
    "sparse": (
        "w4a16",
        lambda c, t: c["quantization_config"].update(format="marlin-24"),
        "stored as 'marlin-24', which cannot be dequantized on reading",
    ),
    "order of activations": (
        "w4a16",
        lambda c, t: t.update({f"{QUERY}.weight_g_idx": torch.arange(64)}),
        f"{QUERY} is quantized in the order of activations",
    ),
    "3 bits": (
        "w4a16",
        lambda c, t: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=3),
        "packed codes of 3 bits, which every release",
    ),
    "about other modules": (
        "int8",
        lambda c, t: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:.*mlp.*"]),
        "no config group of quantization_config is about it",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_dequantized_is_refused_with_the_reason(fault, tiny_model, tmp_path: Path) -> None:
    method, spoil, reason = REFUSED[fault]
    folder = tmp_path / "model"
    quantize_model(tiny_model("llama"), folder, method)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    spoil(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=reason):
        read_inventory(folder)
