"""Checkpoints declared for compressed-tensors, against the parsers, decompressor and weight loaders of others."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.evaluate import load_dequantized
from allocator.export import ExportSettings
from allocator.pipeline import CandidateSettings, export, learn
from allocator.quantize import BankReader
from allocator.score import LearningSettings
from allocator.solve import Rules, SolveSettings, solve_scores

compressed_tensors = pytest.importorskip("compressed_tensors")

ALIKE_IN_ALL_VERSIONS = (2, 4, 8, 16)


@pytest.fixture(scope="module")
def make(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Learns a tiny model once a kind; gives its folder, its bank, and a function from settings to a manifest."""
    learned: dict[Any, Any] = {}

    def get(kind: str, symmetric: bool, widths: tuple[int, ...] = ALIKE_IN_ALL_VERSIONS) -> Any:
        key = kind, symmetric, widths
        if key not in learned:
            candidates = CandidateSettings(
                quantizer="rtn", widths=widths, group_size=32, symmetric=symmetric, sequences=4, sequence_length=32
            )
            work = tmp_path_factory.mktemp("work")
            learned[key] = learn(tiny_model(kind), work, candidates, LearningSettings())
        result = learned[key]
        modules = result.scores.modules.items()
        vocabulary = {name: 16 for name, m in modules if name.endswith("embed_tokens") and len(m.candidates) > 1}

        def manifest(pins: Mapping[str, int] = MappingProxyType({}), **rules: Any) -> Manifest:
            return solve_scores(result.scores, SolveSettings(rules=Rules(pins={**vocabulary, **pins}), **rules))

        return tiny_model(kind), result.bank_folder, manifest

    return get


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_transformers_loads_it_with_equal_logits(
    kind: str, symmetric: bool, make: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, bank, solve = make(kind, symmetric)
    manifest = solve(average_bits=5.5, fusion="tied")
    assert len({m.num_bits for m in manifest.modules.values()}) > 2
    export(manifest, model, bank, tmp_path / "out", ExportSettings("compressed-tensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(48).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, load_dequantized(tmp_path / "out")(tokens).logits)


def test_free_widths_are_refused_with_the_names_of_the_layers(make: Callable[..., Any], tmp_path: Path) -> None:
    model, bank, solve = make("llama", False)
    manifest = solve(average_bits=6, fusion="free", pins={"*.0.self_attn.q_proj": 2, "*.0.self_attn.k_proj": 8})
    with pytest.raises(InputError) as error:
        export(manifest, model, bank, tmp_path / "out", ExportSettings("compressed-tensors"))
    message = str(error.value)
    assert "model.layers.0.self_attn.qkv_proj (q_proj 2 bits, k_proj 8 bits, v_proj" in message
    assert "--fusion tied" in message
    assert not (tmp_path / "out").exists()


def test_a_manifest_with_nothing_quantized_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    model, bank, solve = make("llama", False)
    manifest = solve(budget="1GiB")
    with pytest.raises(InputError, match="below 16 bits"):
        export(manifest, model, bank, tmp_path / "out", ExportSettings("compressed-tensors"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_their_own_decompressor_gives_our_weights(symmetric: bool, make: Callable[..., Any], tmp_path: Path) -> None:
    """At every width that the installed release packs densely: 2, 4 and 8 in all, 3, 5 and 6 from 0.18."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from packaging.version import Version

    dense = Version(compressed_tensors.__version__).release >= (0, 18)
    widths = (2, 3, 4, 5, 6, 8, 16) if dense else ALIKE_IN_ALL_VERSIONS
    model, bank_folder, solve = make("qwen2", symmetric, widths)
    manifest: Manifest = solve(average_bits=7, fusion="tied")
    export(manifest, model, bank_folder, tmp_path / "out", ExportSettings("compressed-tensors"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    scheme_of = {
        name: group for group in QuantizationConfig.model_validate(config).config_groups.values()
        for name in group.targets
    }  # fmt: skip
    bank = BankReader(bank_folder)
    for name, module in manifest.modules.items():
        assert (name in scheme_of) == module.quantized
        if module.quantized:
            tensors = bank.tensors(name, module)
            tensors["weight_scale"] = tensors["weight_scale"].to(torch.float32)
            weight = PackedQuantizationCompressor.decompress(tensors, scheme_of[name])["weight"]
            assert torch.equal(weight, bank.dequantized(name, module)), f"{name} at {module.num_bits}"
