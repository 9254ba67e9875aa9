"""The longest sequence of a model, as planned from config.json, is the one that vLLM derives for itself."""

import json
from types import SimpleNamespace

import pytest

from allocator.model import read_shape
from tests.configs import PUBLISHED_PARAMETERS, config_of
from tests.versions import needs_030

model_config = pytest.importorskip("vllm.config.model")

LONG = 131072


def _llama(**changes):
    return config_of("llama-3.1-8b") | {"max_position_embeddings": 8192, "rope_scaling": None} | changes


def _qwen(**changes):
    return config_of("qwen3-8b") | {"max_position_embeddings": 32768} | changes


def _phi(**changes):
    long = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    return (
        config_of("phi-3-mini-4k")
        | {"max_position_embeddings": LONG, "rope_scaling": {"type": "longrope"} | long}
        | changes
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FACTORS = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
ORIGINAL = {"original_max_position_embeddings": 8192}
CONFIGS = {name: config_of(name) for name in PUBLISHED_PARAMETERS} | {
    "linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "linear, new names": _llama(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}),
    "linear, no whole number": _llama(max_position_embeddings=1000, rope_scaling={"type": "linear", "factor": 1.333}),
    "rope_scaling wins": _llama(
        rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters={"rope_type": "linear", "factor": 2.0}
    ),
    "dynamic": _llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "default": _llama(rope_scaling={"rope_type": "default"}),
    "yarn": _qwen(rope_scaling=YARN),
    "yarn, old name": _qwen(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn, length stretched": _qwen(
        max_position_embeddings=LONG,
        rope_parameters=YARN | {"rope_theta": 1e6},
    ),
    "yarn without original": _qwen(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "llama3": _llama(
        max_position_embeddings=LONG,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
    ),
    "longrope": _phi(original_max_position_embeddings=4096),
    "longrope, original left out": _phi(original_max_position_embeddings=None),
    "su": _phi(rope_scaling=_phi()["rope_scaling"] | {"type": "su"} | ORIGINAL),
    "longrope of llama": _llama(
        max_position_embeddings=LONG,
        rope_scaling={"rope_type": "longrope", "factor": 16.0} | ORIGINAL | FACTORS,
    ),
    "mrope": _qwen(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}),
    "max_position_embeddings left out": {k: v for k, v in _llama().items() if k != "max_position_embeddings"},
    "phi, left out": {k: v for k, v in config_of("phi-3-mini-4k").items() if k != "max_position_embeddings"},
    "model_max_length": _llama(model_max_length=4096),
    "longer model_max_length": _llama(model_max_length=16384),
    "seq_length": _llama(seq_length=2048),
    "max_sequence_length and linear": _llama(max_sequence_length=4096, rope_scaling={"type": "linear", "factor": 2.0}),
    "window of all layers": config_of("qwen3-8b") | {"sliding_window": 1024, "use_sliding_window": True},
    "window of 0": _llama(sliding_window=0),
}  # fmt: skip


def _of_vllm(folder, max_model_len=None):
    """What `ModelConfig` makes of --max-model-len, without looking at the model's code."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = get_config(folder, trust_remote_code=False)
    text = get_hf_text_config(config)
    if not getattr(text, "sliding_window", None):
        text.sliding_window = None
    known = SimpleNamespace(
        runner_type="generate", hf_config=config, hf_text_config=text, disable_sliding_window=False,
        get_sliding_window=lambda: text.sliding_window, spec_target_max_model_len=None, encoder_config=None,
        model_arch_config=ModelArchConfigConvertorBase(config, text).convert(),
    )  # fmt: skip
    return model_config.ModelConfig.get_and_verify_max_len(known, max_model_len)


@needs_030
@pytest.mark.parametrize("name", CONFIGS)
def test_default_and_longest_are_those_of_vllm(name, tmp_path):
    config = {key: value for key, value in CONFIGS[name].items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # vLLM takes lengths of a tokenizer for some pooling models only.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    context = read_shape(config).context
    assert context.default == _of_vllm(tmp_path)
    assert context.longest == _of_vllm(tmp_path, context.longest)
    with pytest.raises(ValueError, match=r"max_model_len|max_position_embeddings"):
        _of_vllm(tmp_path, context.longest + 1)
