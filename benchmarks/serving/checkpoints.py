"""Models of real shapes with random weights, and their checkpoints: speed does not depend on values.

Codes, scales and zero points are random as well, so nothing is quantized and a checkpoint is written in seconds. The
assignments are those of the solver, for made-up scores that fall with the width as errors of rounding do.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from allocator.contract.bank import ModelReference
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.compressed_tensors import compressed_tensors_config
from allocator.contract.digest import digest_bytes
from allocator.contract.layout import ModuleFormat, TensorSpec, module_bytes, module_tensors
from allocator.contract.manifest import MANIFEST_NAME, Budget, Manifest
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.model import Inventory, read_inventory
from allocator.solve import SolveSettings, solve_scores

__all__ = [
    "SHAPES",
    "TOKENIZER",
    "Fusion",
    "Vocabulary",
    "assign",
    "uniform",
    "write_checkpoint",
    "write_declaration",
    "write_model",
]

TOKENIZER = Path(__file__).parents[1] / "demo" / "model"

SHAPES: dict[str, dict[str, int]] = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
"""Sizes as published; all have 8 KV heads of 128. The two small ones tie their embeddings."""

GROUP_SIZE = 128
_DRAWN = 1 << 22
WIDTHS = (2, 3, 4, 5, 6, 8)

Vocabulary = Literal["quantized", "16 bits"]
Fusion = Literal["free", "tied"]
Format = Literal["gamma", "compressed-tensors"]


def write_model(name: str, folder: Path, weights: bool = True, seed: int = 0) -> Path:
    """A bfloat16 model of shape `name` with random weights; what is there is left alone.

    Without `weights` the file of them is a hole with a header, for `--load-format dummy`.
    """
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((TOKENIZER / "config.json").read_text()) | SHAPES[name]
    del config["layer_types"]
    tied = name in ("Qwen3-0.6B", "Qwen3-1.7B")
    config |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960}
    config |= {"tie_word_embeddings": tied, "max_window_layers": config["num_hidden_layers"]}
    config["rope_parameters"] = {"rope_theta": 1_000_000.0, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, folder)
    if weights:
        rng = np.random.default_rng(seed)
        tensors = {n: _model_tensor(n, shape, rng) for n, shape in _model_shapes(config).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        _write_hollow(_model_shapes(config), folder / "model.safetensors")
    return folder


def _write_hollow(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """A bfloat16 safetensors file with a hole where the weights would be."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _model_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else _weight(shape, rng)


def _model_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inter, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors["model.norm.weight"] = (hidden,)
    shapes = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
    return tensors


def _weight(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    drawn = rng.standard_normal(min(math.prod(shape), _DRAWN), dtype=np.float32)
    return _repeated(torch.from_numpy(drawn).mul_(0.02).to(torch.bfloat16), shape)


def _repeated(drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Large tensors repeat what was drawn: drawing all of a 32B model takes minutes."""
    size = math.prod(shape)
    return drawn.repeat(-(-size // len(drawn)))[:size].reshape(shape)


def assign(inventory: Inventory, average_bits: float, fusion: Fusion, vocabulary: Vocabulary) -> Manifest:
    """The solver's assignment at `average_bits` over the modules that can be quantized, for made-up scores."""
    rng = np.random.default_rng(1)
    modules = {}
    for module in inventory.modules:
        sixteen = ModuleFormat(shape=module.shape, num_bits=16)
        fixed = module.role != "linear" and vocabulary == "16 bits"
        sensitivity = float(rng.lognormal(0, 1.2)) * module.parameters * (4 if module.role != "linear" else 1)
        formats = [] if fixed else [_format(module.shape, bits) for bits in WIDTHS]
        candidates = [_candidate(f, sensitivity * 4.0**-f.num_bits) for f in formats]
        modules[module.name] = ScoredModule(
            fused_group=module.fused_group, candidates=[*candidates, _candidate(sixteen, 0.0)]
        )
    scores = Scores(
        model=_reference(inventory),
        bank_digest=digest_bytes(b"random"),
        dtype="BF16",
        method="made up",
        unit="none",
        settings={},
        other_bytes=inventory.other_bytes,
        modules=modules,
    )
    return solve_scores(scores, SolveSettings(average_bits=average_bits, fusion=fusion))


def uniform(inventory: Inventory, num_bits: int) -> Manifest:
    """Every linear module at one width, symmetric as published 4-bit checkpoints are; the vocabulary at 16 bits."""
    modules = {
        m.name: _format(m.shape, num_bits, symmetric=True)
        if m.role == "linear"
        else ModuleFormat(shape=m.shape, num_bits=16)
        for m in inventory.modules
    }
    sizes = {name: module_bytes(module) for name, module in modules.items()}
    total = inventory.other_bytes + sum(sizes.values())
    return Manifest(
        model=_reference(inventory),
        bank_digest=digest_bytes(b"random"),
        method="uniform",
        dtype="BF16",
        budget=Budget(requested=f"{num_bits} bits", nbytes=total),
        tensor_bytes=total,
        other_bytes=inventory.other_bytes,
        module_bytes=sizes,
        modules=modules,
    )


def write_checkpoint(model: Path, manifest: Manifest, folder: Path, declared: Format = "gamma", seed: int = 2) -> Path:
    """A checkpoint of `manifest` with random codes, scales and zero points; what is there is left alone."""
    if (folder / "model.safetensors").exists():
        return folder
    inventory, rng = read_inventory(model), np.random.default_rng(seed)
    write_declaration(model, manifest, folder, declared)
    tensors: dict[str, Tensor] = {}
    for name, module in manifest.modules.items():
        for spec in module_tensors(name, module, manifest.dtype):
            tensors[spec.name] = _random_tensor(spec, module, rng)
    for other in inventory.others:
        tensors[other.name] = torch.ones(other.shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_declaration(model: Path, manifest: Manifest, folder: Path, declared: Format = "gamma") -> Path:
    """The checkpoint without its tensors: config, manifest and tokenizer, which is what `gamma probe` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)
    if declared == "gamma":
        quantization = CheckpointConfig.of_manifest(manifest).model_dump(mode="json", exclude_none=True)
    else:
        quantization = compressed_tensors_config(manifest.modules)
    config = dict(read_inventory(model).config) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    manifest.write(folder / MANIFEST_NAME)
    return folder


def _random_tensor(spec: TensorSpec, module: ModuleFormat, rng: np.random.Generator) -> Tensor:
    if spec.dtype == "I64":
        return torch.tensor(module.shape)
    if spec.dtype == "I32":
        drawn = bytearray(rng.bytes(4 * min(math.prod(spec.shape), _DRAWN)))
        return _repeated(torch.frombuffer(drawn, dtype=torch.int32), spec.shape)
    if not module.quantized:
        return _weight(spec.shape, rng)
    # The weights have a standard deviation of about .02, as those of the model.
    scale = 0.02 * 12**0.5 / 2**module.num_bits
    drawn = rng.uniform(0.8, 1.2, min(math.prod(spec.shape), _DRAWN)).astype(np.float32)
    return _repeated(torch.from_numpy(drawn).mul_(scale).to(torch.bfloat16), spec.shape)


def _format(shape: tuple[int, int], num_bits: int, symmetric: bool = False) -> ModuleFormat:
    return ModuleFormat.model_validate(
        {"shape": shape, "num_bits": num_bits, "group_size": GROUP_SIZE, "symmetric": symmetric}
    )


def _candidate(module: ModuleFormat, score: float) -> Candidate:
    return Candidate(format=module, nbytes=module_bytes(module), score=score)


def _reference(inventory: Inventory) -> ModelReference:
    name = inventory.folder.name
    return ModelReference(name=name, architecture=inventory.architecture, digest=digest_bytes(name.encode()))
