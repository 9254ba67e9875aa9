"""Fixtures shared by all tests: tiny models made on the spot, and the trained ones where they are at hand."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.skips import (  # noqa: F401 - hooks
    lacking,
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ROOT.parent / "shared" / "data" / "models"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=lacking("gpu", "there is no NVIDIA GPU")))


@pytest.fixture(scope="session")
def trained_model() -> Callable[[str], Path]:
    """Folder of a trained model by name; skips the test where the trained models are not at hand."""

    def find(name: str) -> Path:
        folder = TRAINED / name
        if not folder.is_dir():
            pytest.skip(lacking("model", f"trained model {name} is not at hand ({folder.parent} has no such folder)"))
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of two blocks with a byte tokenizer: "llama" (untied), "qwen3" (tied), "qwen2" (biases),
    "qwen3_moe" and "mixtral" (experts), "phi3" (fused on disk), "gemma3" (every second block with a window of 24)."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = _make_tiny(kind, tmp_path_factory.mktemp(f"tiny-{kind}"))
        return made[kind]

    return make


def _make_tiny(kind: str, folder: Path) -> Path:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    name, changes = {
        "llama": ("Llama", {}),
        "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        "qwen2": ("Qwen2", {}),
        "qwen3_moe": (
            "Qwen3Moe",
            {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2} | {"moe_intermediate_size": 64},
        ),
        "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "phi3": ("Phi3", {}),
        "gemma3": (
            "Gemma3",
            {"head_dim": 32, "tie_word_embeddings": True, "sliding_window": 24}
            | {"layer_types": ["sliding_attention", "full_attention"]},
        ),
    }[kind]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**(sizes | {"tie_word_embeddings": False} | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>"
    ).save_pretrained(folder)
    return folder
