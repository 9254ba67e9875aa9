"""What each block keeps of the tokens it has seen, from config.json: keys and values, or a state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from allocator.model.architectures import Architecture

__all__ = ["AttentionLayer", "RecurrentState", "attention_layers"]


@dataclass(frozen=True)
class RecurrentState:
    """What linear attention, Mamba or a short convolution keeps of each sequence, however long it is.

    The last `steps` inputs of a convolution over `channels` and, for each of `groups`, over `group_channels` more; and
    `numbers` numbers of `number_bytes` each. Ranks divide all of it, but each needs a group of its own. vLLM keeps
    `copies` of it, with prefix caching (`MambaSpec`, mode `align`): that of the last whole block, that which the
    sequence is at, and with Mamba 2 one more for the end of a prompt.
    """

    steps: int
    channels: int
    groups: int = 0
    group_channels: int = 0
    numbers: int = 0
    number_bytes: int = 2
    copies: int = 2

    def nbytes(self, tensor_parallel_size: int) -> int:
        """On one rank, the inputs of the convolution at 16 bits (`MambaStateShapeCalculator`)."""
        size = tensor_parallel_size
        groups = size if self.groups % size else self.groups
        convolved = (self.channels + groups * self.group_channels) // size
        return 2 * self.steps * convolved + self.number_bytes * self.numbers // size


@dataclass(frozen=True)
class AttentionLayer:
    """What one block keeps of each token: `kv_heads` keys of `key_size` and values of `value_size` numbers.

    For latent attention (`mla`) one vector of `key_size` numbers, which all ranks hold. `window` is that of a sliding
    window, or the size of the chunks (`chunked`) that are attended to apart, None for full attention. A layer of the
    kind `state` keeps `state` of each sequence instead, one of the kind `nothing` reads what another keeps, or has no
    attention; `other` is not known.
    """

    kind: Literal["full", "sliding", "chunked", "mla", "state", "nothing", "other"]
    kv_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int | None = None
    state: RecurrentState | None = None


_MAMBA_2 = (
    ("mamba_d_state", "mamba_expand*hidden_size", "mamba_d_conv", "mamba_n_groups"),
    ("ssm_state_size", "mamba_num_heads*mamba_head_dim", "conv_kernel", "n_groups"),
)
"""Size of the state, of the channels and of the convolution, and groups: in the words of Granite and of Nemotron-H."""

_STATEFUL = ("linear_attention", "conv")
_WITHOUT = ("mlp", "moe")


def attention_layers(
    architecture: str, rules: Architecture, config: dict[str, Any], blocks: int
) -> tuple[AttentionLayer, ...]:
    """The layer of each block; `config` is that of `rules.language`. Raises InputError naming the key of a bad size."""
    keys = _Keys(architecture, rules, config)
    if rules.attention == "mla":
        if keys.number("index_head_dim"):  # sparse attention, whose index is a cache of its own
            return (AttentionLayer("other"),) * blocks
        latent = rules.dimension("kv_lora_rank+qk_rope_head_dim", config)
        return (AttentionLayer("mla", 1, latent, 0),) * blocks
    with_cache = blocks - (keys.number("num_kv_shared_layers") or 0)
    layers = []
    for i, (window, kind) in enumerate(zip(_windows(rules, config, blocks), rules.kinds(blocks, config), strict=True)):
        if i >= with_cache or kind in _WITHOUT:
            layers.append(AttentionLayer("nothing"))
        elif kind in _STATEFUL:
            state = _state(keys)
            layers.append(AttentionLayer("other") if state is None else AttentionLayer("state", state=state))
        elif kind == "chunked_attention" and (chunk := keys.number("attention_chunk_size")):
            layers.append(AttentionLayer("chunked", *keys.sizes(i, kind), chunk))
        elif kind in ("full_attention", "sliding_attention", "chunked_attention", None):
            layers.append(AttentionLayer("full" if window is None else "sliding", *keys.sizes(i, kind), window))
        else:
            layers.append(AttentionLayer("other"))
    return tuple(layers)


@dataclass(frozen=True)
class _Keys:
    """config.json, and what the config class has where it says nothing."""

    architecture: str
    rules: Architecture
    config: dict[str, Any]

    def number(self, key: str) -> int | None:
        value = self.config.get(key, self.rules.defaults.get(key))
        return value if type(value) is int else None

    def __getitem__(self, expression: str) -> int:
        return self.rules.dimension(expression, self.config)

    def sizes(self, block: int, kind: str | None) -> tuple[int, int, int]:
        """Heads of keys and values, and the sizes of a key and of a value, of a layer with attention.

        Sizes of its own has a layer by its kind (`swa_` keys of sliding windows, `global` ones of full attention), or
        by its number (`per_layer_config`).
        """
        named = {"heads": "num_key_value_heads", "key": "head_dim", "value": "v_head_dim"}
        if kind == "sliding_attention":
            own = {name: self.number(f"swa_{key}") for name, key in named.items()}
        else:
            own = {"key": self.number("global_head_dim")}
            if self.config.get("attention_k_eq_v", True):
                own["heads"] = self.number("num_global_key_value_heads")
            own["value"] = self.number("v_head_dim") if own["key"] is None else None
        per_layer = self.config.get("per_layer_config")
        if isinstance(per_layer, Mapping):
            here: dict[str, Any] = next((v for k, v in per_layer.items() if str(k).isdecimal() and int(k) == block), {})
            own |= {name: here[key] for name, key in named.items() if type(here.get(key)) is int}
        heads = own.get("heads") or self["num_key_value_heads"]
        key = own.get("key") or self["head_dim"]
        return heads, key, own.get("value") or key


def _state(keys: _Keys) -> RecurrentState | None:
    """The state of the recurrent layers by the keys that the config has, None for one of another form."""
    if keys.number("linear_key_head_dim"):  # the gated delta net
        key_heads, value_heads = keys["linear_num_key_heads"], keys["linear_num_value_heads"]
        key_size, value_size = keys["linear_key_head_dim"], keys["linear_value_head_dim"]
        return RecurrentState(
            steps=keys["linear_conv_kernel_dim"] - 1,
            channels=2 * key_heads * key_size + value_heads * value_size,
            numbers=value_heads * value_size * key_size,
            number_bytes=_number_bytes(keys),
        )
    for size, inner, convolution, groups in _MAMBA_2:
        if keys.number(size):
            return RecurrentState(
                steps=keys[convolution] - 1,
                channels=keys[inner],
                groups=keys[groups],
                group_channels=2 * keys[size],
                numbers=keys[inner] * keys[size],
                number_bytes=_number_bytes(keys),
                copies=3,
            )
    if keys.number("conv_L_cache"):  # the short convolution of LFM2
        channels = keys.number("conv_dim") or keys["hidden_size"]
        return RecurrentState(steps=keys["conv_L_cache"] - 1, channels=channels)
    return None


_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _number_bytes(keys: _Keys) -> int:
    """Bytes of a number of the state: 16 bits as the model, but where vLLM heeds what config.json says
    (`models/config.py`), of Nemotron-H also its silence."""
    if keys.architecture.startswith("NemotronH"):
        return _FLOAT_BYTES.get(str(keys.config.get("mamba_ssm_cache_dtype")), 4)
    if keys.architecture.startswith("Qwen3_5"):
        return _FLOAT_BYTES.get(str(keys.config.get("mamba_ssm_dtype")), 2)
    return 2


def _windows(rules: Architecture, config: dict[str, Any], blocks: int) -> list[int | None]:
    """The sliding window of each layer as vLLM sees it, None for full attention.

    Models whose code takes no window for each layer get one only if all layers have it (`EngineArgs`).
    """
    window = config.get("sliding_window", rules.defaults.get("sliding_window"))
    if rules.window == "none" or not isinstance(window, int) or not window:
        return [None] * blocks
    if rules.window == "every":
        return [window] * blocks
    types = config.get("layer_types")
    if rules.window == "use_sliding_window":
        every = bool(config.get("use_sliding_window")) and not config.get("max_window_layers", blocks)
        if isinstance(types, list):
            every = bool(config.get("use_sliding_window")) and set(types) == {"sliding_attention"}
        return [window if every else None] * blocks
    return [window if kind == "sliding_attention" else None for kind in rules.kinds(blocks, config)]
