"""GGUF files as Hugging Face folders: the same predictions, whatever the file format did to the weights."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs import GGUF
from tests.skips import lacking

if str(GGUF) not in sys.path:
    sys.path.append(str(GGUF))
try:
    import gguf
except ImportError:
    pytest.skip(lacking("package", "gguf is not here"), allow_module_level=True)

from allocator.contract.errors import InputError
from benchmarks.real_models import gguf_model

_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
}  # fmt: skip
_LLAMA = _NAMES | {"ffn_norm": "post_attention_layernorm"}
_GEMMA = _NAMES | {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp stores q and k of Llama: row 2i of a head is its row i, row 2i + 1 its row i + half."""
    rows = len(weight) // heads
    order = [h * rows + i + half for h in range(heads) for i in range(rows // 2) for half in (0, rows // 2)]
    return weight[order]


def write_gguf(path: Path, model: Any, family: str, kind: Any = None, copies: Any = None) -> None:
    """The tiny `model` with a byte-level tokenizer; matrices as `kind`; `copies`: types of a matrix stored twice."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, family)
    numbers = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings"}
    numbers |= {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"}
    numbers |= {"attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads"}
    for name, ours in numbers.items():
        writer.add_uint32(f"{family}.{name}", getattr(config, ours))
    writer.add_uint32(f"{family}.attention.key_length", config.head_dim)
    writer.add_float32(f"{family}.rope.freq_base", 10000.0 if family == "llama" else 1e6)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-6)
    if family == "gemma3":
        writer.add_uint32("gemma3.attention.sliding_window", config.sliding_window)
    write_tokenizer(writer, config.vocab_size)
    for index in range(config.num_hidden_layers):
        for name, ours in (_LLAMA if family == "llama" else _GEMMA).items():
            weight = state[f"model.layers.{index}.{ours}.weight"].float()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            weight = interleaved(weight, heads) if heads and family == "llama" else weight
            add(writer, f"blk.{index}.{name}.weight", weight, family, kind)
    embedding, norm = state["model.embed_tokens.weight"].float(), state["model.norm.weight"].float()
    add(writer, "token_embd.weight", embedding, family, copies[0] if copies else kind)
    add(writer, "output_norm.weight", norm, family, kind)
    if copies or not config.tie_word_embeddings:
        add(writer, "output.weight", state["lm_head.weight"].float(), family, copies[1] if copies else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: Any, name: str, weight: torch.Tensor, family: str, kind: Any) -> None:
    weight = weight + 1 if "norm" in name and family == "gemma3" else weight
    kind = gguf.GGMLQuantizationType.F32 if weight.dim() == 1 or kind is None else kind
    writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)


def write_tokenizer(writer: Any, vocabulary: int) -> None:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", *letters, letters[0] + letters[1], *(f"<extra{i}>" for i in range(vocabulary - 258))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * 257, *[3] * (vocabulary - 258)])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.fixture
def opened(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    from transformers import AutoModelForCausalLM

    def load(kind: str, **config: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32, **config)

    return load


TOKENS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_file_becomes_a_folder_that_predicts_the_same(
    opened: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # What a file of Gemma 3 does not say: every sixth block sees all, the others a window.
    unsaid = {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 32} if family == "gemma3" else {}
    model = opened(family, **unsaid)
    write_gguf(tmp_path / "model.gguf", model, family)
    tied = bool(model.config.tie_word_embeddings)
    gguf_model.folder_from_gguf(tmp_path / "model.gguf", tmp_path / "model", tied, torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "transformers_version" in config, "else large vocabularies are warned of"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("ab").input_ids[0] == 0, "the file says that BOS comes first"
    assert tokenizer.decode(tokenizer("ab").input_ids[1:]) == "ab"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_of_two_copies_of_a_tied_matrix_the_finer_is_taken(opened: Callable[..., Any], tmp_path: Path) -> None:
    kinds = gguf.GGMLQuantizationType
    model = opened("gemma3")
    fine = model.model.embed_tokens.weight
    for copies in ((kinds.Q4_0, kinds.Q8_0), (kinds.Q8_0, kinds.Q4_0)):
        write_gguf(tmp_path / "model.gguf", model, "gemma3", copies=copies)
        weights = dict(gguf_model.weights_of_gguf(gguf.GGUFReader(tmp_path / "model.gguf"), tied=True))
        error = (weights["model.embed_tokens.weight"] - fine).square().mean() / fine.square().mean()
        assert error < 1e-4, copies
        assert "lm_head.weight" not in weights


def test_weights_go_back_into_a_file(opened: Callable[..., Any], tmp_path: Path) -> None:
    model = opened("llama")
    write_gguf(tmp_path / "model.gguf", model, "llama", gguf.GGMLQuantizationType.Q8_0)
    gguf_model.gguf_from_weights(
        tmp_path / "model.gguf", model.state_dict().__getitem__, tmp_path / "whole.gguf", tied=False
    )
    weights = dict(gguf_model.weights_of_gguf(gguf.GGUFReader(tmp_path / "whole.gguf"), tied=False))
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name  # the tiny model's weights are bfloat16, and so are the file's


def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt-9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture gpt-9 are not known here; known: llama, qwen2, gemma3"):
        gguf_model.folder_from_gguf(tmp_path / "model.gguf", tmp_path / "model", tied=True)
