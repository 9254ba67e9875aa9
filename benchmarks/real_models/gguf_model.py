"""A GGUF file as an ordinary Hugging Face model folder, and weights back in a GGUF file.

Both directions go through one table of tensor names. What the format does to a model on the way: q and k of Llama have
their rotary pairs interleaved, norms of Gemma have one added, and a tied matrix may be there twice.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from torch import Tensor

from allocator.contract.errors import InputError

__all__ = ["folder_from_gguf", "gguf_from_weights", "gguf_name", "hf_name", "weights_of_gguf"]

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
}  # fmt: skip
_LLAMA = _LINEARS | {"ffn_norm": "post_attention_layernorm"}
_GEMMA = _LINEARS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class _Family:
    """names: of the parts of a block; interleaved: whether q and k are; added: to every norm's weight in the file."""

    architecture: str
    model_type: str
    names: Mapping[str, str]
    more: Callable[[Mapping[str, Any]], dict[str, Any]]
    interleaved: bool = False
    added: float = 0.0


def _gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a Gemma 3 file does not say: every sixth layer sees all, the others a window with a RoPE of their own."""
    layers = range(1, config["num_hidden_layers"] + 1)
    return {
        "layer_types": ["full_attention" if i % 6 == 0 else "sliding_attention" for i in layers],
        "query_pre_attn_scalar": config["head_dim"],
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", "llama", _LLAMA, lambda _: {"hidden_act": "silu"}, interleaved=True),
    "qwen2": _Family("Qwen2ForCausalLM", "qwen2", _LLAMA, lambda _: {"hidden_act": "silu"}),
    "gemma3": _Family("Gemma3ForCausalLM", "gemma3_text", _GEMMA, _gemma, added=1.0),
}
_CONFIG = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
}


def _fields(reader: GGUFReader) -> dict[str, Any]:
    """The metadata without the tokenizer's lists, which are slow to read."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}


def _family(fields: Mapping[str, Any]) -> _Family:
    name = fields["general.architecture"]
    if name not in _FAMILIES:
        raise InputError(f"GGUF files of architecture {name} are not known here; known: {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def hf_name(family: str, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, kind = name.rsplit(".", 1)
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    parts = stem.split(".")
    known = _FAMILIES[family].names
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in known:
        raise InputError(f"tensor {name} is not known in GGUF files of architecture {family}")
    return f"model.layers.{parts[1]}.{known[parts[2]]}.{kind}"


def gguf_name(family: str, name: str) -> str:
    """The inverse of `hf_name`, for tensors of blocks."""
    _, _, index, part = name.split(".", 3)
    stem, kind = part.rsplit(".", 1)
    ours = {hf: gguf for gguf, hf in _FAMILIES[family].names.items()}
    return f"blk.{index}.{ours[stem]}.{kind}"


def _heads(fields: Mapping[str, Any], name: str) -> int:
    """How many heads the rows of `name` are interleaved in, 0 if they are not."""
    family = fields["general.architecture"]
    part = name.split(".")[-2]
    if not _FAMILIES[family].interleaved or part not in ("attn_q", "attn_k"):
        return 0
    return int(fields[f"{family}.attention.head_count" + ("_kv" if part == "attn_k" else "")])


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of both halves of a head, one after the other in turn: as the file has them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else weight


def _separate(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `_interleave`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else weight


def _bits(tensor: ReaderTensor) -> float:
    block, nbytes = GGML_QUANT_SIZES[tensor.tensor_type]
    return float(8 * nbytes / block)


def weights_of_gguf(reader: GGUFReader, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 weight of every tensor, as the Hugging Face model has them.

    tied: embedding and lm_head are one matrix; of two copies the one with more bits a weight is taken.
    """
    fields = _fields(reader)
    family = _family(fields)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if tied and "output.weight" in tensors:
        copies = [tensors.pop("output.weight"), tensors["token_embd.weight"]]
        tensors["token_embd.weight"] = max(copies, key=_bits)
    for name, tensor in tensors.items():
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = _separate(torch.from_numpy(np.array(values, dtype=np.float32)), _heads(fields, name))
        yield hf_name(fields["general.architecture"], name), weight - (family.added if "norm" in name else 0.0)


def gguf_from_weights(source: Path, weight: Callable[[str], Tensor], target: Path, tied: bool) -> None:
    """Write `target`: the GGUF file `source` with other weights, matrices as bfloat16.

    `weight` gives the Hugging Face tensor of a name. The second copy of a tied matrix is left out.
    """
    reader = GGUFReader(source)
    fields = _fields(reader)
    family = _family(fields)
    writer = GGUFWriter(target, fields["general.architecture"])
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            is_array = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        if tied and tensor.name == "output.weight":
            continue
        values = weight(hf_name(fields["general.architecture"], tensor.name)).float()
        values = _interleave(values, _heads(fields, tensor.name)) + (family.added if "norm" in tensor.name else 0.0)
        kind = GGMLQuantizationType.BF16 if values.dim() == 2 else GGMLQuantizationType.F32
        array = np.ascontiguousarray(values.numpy())
        writer.add_tensor(tensor.name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def folder_from_gguf(file: Path, folder: Path, tied: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the Hugging Face folder of a GGUF file: config, weights in `dtype`, tokenizer, chat template.

    The folder appears as a whole. Raises InputError for an architecture or a tensor that is not known.
    """
    reader = GGUFReader(file)
    fields = _fields(reader)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "model"
        made.mkdir()
        weights = {name: weight.to(dtype).contiguous() for name, weight in weights_of_gguf(reader, tied)}
        save_file(weights, made / "model.safetensors", {"format": "pt"})
        vocabulary = len(weights["model.embed_tokens.weight"])
        config = _config(fields, tied, vocabulary, "model.layers.0.self_attn.q_proj.bias" in weights)
        config["dtype"] = str(dtype).removeprefix("torch.")
        # Without it transformers warns of every large vocabulary that it might be Mistral's, read wrongly.
        config["transformers_version"] = transformers.__version__
        _write_json(made / "config.json", config)
        ids = {f"{t}_token_id": config[f"{t}_token_id"] for t in ("bos", "eos", "pad") if f"{t}_token_id" in config}
        _write_json(made / "generation_config.json", ids)
        _write_tokenizer(file, made, fields, config)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)


def _config(fields: Mapping[str, Any], tied: bool, vocabulary: int, biases: bool) -> dict[str, Any]:
    name = fields["general.architecture"]
    family = _family(fields)
    config = {ours: fields[f"{name}.{theirs}"] for ours, theirs in _CONFIG.items() if f"{name}.{theirs}" in fields}
    config = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in config.items()}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {
        k: fields[f"tokenizer.ggml.{v}_token_id"] for k, v in ids.items() if f"tokenizer.ggml.{v}_token_id" in fields
    }
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **config,
        **({"attention_bias": biases, "mlp_bias": False} if family.model_type == "llama" else {}),
        **family.more(config),
        **{f"{key}_token_id": int(value) for key, value in ids.items()},
    }


def _write_tokenizer(file: Path, folder: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """transformers reads tokenizers of GGUF files, chat template included, but does not put BOS where the file says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    begins = tokenizer("a").input_ids[:1] == [config.get("bos_token_id")]
    if fields.get("tokenizer.ggml.add_bos_token", False) and not begins:
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.bos_token
        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, config["bos_token_id"])]
        )
        fast.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
