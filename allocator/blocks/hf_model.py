"""Config, model and tokenizer of a folder as transformers opens them; what it cannot open is refused in one line.

Python code that a folder brings along is never run: what transformers has no code for itself is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from allocator.blocks.skeleton import decoder_blocks
from allocator.blocks.tensors import read_tensor
from allocator.contract.errors import GammaError, InputError
from allocator.model import read_inventory
from allocator.model.expert_stacks import ExpertMatrix
from allocator.model.hf_config import read_config
from allocator.model.other_names import RENAMED
from allocator.model.quantized_source import split_quantization

__all__ = ["build_skeleton", "has_tokenizer", "model_class", "open_config", "open_model", "open_tokenizer"]

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip
_REASON_CHARACTERS = 200


def open_config(folder: Path) -> Any:
    """The transformers config of a model folder. Raises InputError if it is none that a model can be built from."""
    from transformers import AutoConfig

    with _explained(folder / "config.json", "transformers cannot read it", "take that of the original model"):
        config = _renamed_config(folder) or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        for part in (config, text):  # its weights are dequantized on reading
            if hasattr(part, "quantization_config"):
                del part.quantization_config
    rows, pad = text.vocab_size, getattr(text, "pad_token_id", None)
    if isinstance(pad, int) and not -rows <= pad < rows:
        raise InputError(
            f"{folder / 'config.json'}: pad_token_id {pad} is outside the vocabulary of {rows} tokens; "
            "set it to one of them, or to null"
        )
    return config


def _renamed_config(folder: Path) -> Any:
    """The config of a model that transformers knows under another name only; None for others."""
    from transformers import CONFIG_MAPPING

    given = read_config(folder)
    other = RENAMED.get(str((given.get("architectures") or [None])[0]))
    if other is None or other.model_type is None:
        return None
    known_already = {"auto_map", "model_type"}
    return CONFIG_MAPPING[other.model_type].from_dict({k: v for k, v in given.items() if k not in known_already})


def build_skeleton(folder: Path, config: Any) -> Any:
    """The causal language model of `config` on the meta device: structure without weights. Raises InputError."""
    model = _built(folder, config, torch.device("meta"))
    _, blocks = decoder_blocks(model)
    if {name for name, buffer in blocks.named_buffers() if buffer.is_meta} <= blocks.state_dict().keys():
        return model
    return _built(folder, config, _WithTables())  # computed when blocks are made, in no file


def _built(folder: Path, config: Any, device: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModelForCausalLM

    with (
        _explained(folder / "config.json", "transformers cannot build this model", "take that of the original model"),
        device,
    ):
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_MAPPING:
            return _WithHead(config)
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
        except ValueError as error:
            if "does not support an attention implementation" not in str(error):
                raise
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )


def model_class(config: Any) -> Any:
    """The class that a model's config names: the causal language model, with what stands beside it if it has such."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def open_model(folder: Path, **options: Any) -> Any:
    """The whole causal language model of a folder in float32, in eval mode. Raises InputError."""
    config = open_config(folder)
    state = _dequantized_state(folder)
    with _explained(folder, "transformers cannot load the model", "`gamma inspect` checks its files"):
        model = model_class(config).from_pretrained(
            folder if state is None else None, state_dict=state, config=config, dtype=torch.float32,
            trust_remote_code=False, **options,
        )  # fmt: skip
    return model.eval()


def _dequantized_state(folder: Path) -> dict[str, torch.Tensor] | None:
    """All tensors of a model that is quantized already, dequantized; None for another model."""
    if split_quantization(read_config(folder), folder)[1] is None:
        return None
    tensors = read_inventory(folder).tensors
    wholes = {t.name: t for t in (t.stack if isinstance(t, ExpertMatrix) else t for t in tensors)}
    return {name: read_tensor(tensor) for name, tensor in wholes.items()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises InputError if it has none, or one that is code of its own."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise InputError(
            f"{folder}: has no tokenizer, so no text can be read for the model; copy tokenizer.json and "
            "tokenizer_config.json of the original model into it"
        )
    advice = "copy the tokenizer files of the original model again"
    with _explained(folder, "transformers cannot open its tokenizer", advice):
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise InputError(
                f"{folder}: its tokenizer is Python code of its own (auto_map in tokenizer_config.json), which gamma "
                "does not run; put a tokenizer.json beside it that says the same, and take auto_map out"
            ) from None


class _WithTables(TorchFunctionMode):
    """As the meta device, for memory that is to be filled with weights alone: what is computed is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.randn, torch.rand) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class _WithHead(nn.Module):
    """A language model that transformers has only inside a multimodal one (Qwen3-VL): its backbone and a lm_head."""

    def __init__(self, config: Any) -> None:
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, **inputs: Any) -> Any:
        """As causal language models of transformers answer."""
        return SimpleNamespace(logits=self.lm_head(self.model(**inputs)[0]))


@contextmanager
def _explained(what: Path, fault: str, advice: str) -> Iterator[None]:
    """Whatever transformers raises, as an InputError of one line."""
    try:
        yield
    except (GammaError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # a folder can be wrong in as many ways as transformers has errors
        text = " ".join(str(error).split())[:_REASON_CHARACTERS]
        reason = type(error).__name__ if not text or "trust_remote_code" in text else f"{type(error).__name__}: {text}"
        raise InputError(f"{what}: {fault} ({reason}); {advice}") from error
