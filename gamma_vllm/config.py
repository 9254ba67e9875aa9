"""`quant_method: gamma`: which layer is stored how, and the refusal of all that does not fit together."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from allocator.contract.checkpoint import CheckpointConfig, check_checkpoint
from allocator.contract.errors import ContractError
from allocator.contract.manifest import MANIFEST_NAME, Manifest
from allocator.contract.modules import row_block_name
from allocator.contract.served_bank import ServedBank
from gamma_vllm.announce import announce
from gamma_vllm.bank_loading import chosen, find_served_bank
from gamma_vllm.compatibility import require_weight_mapper
from gamma_vllm.embedding import GammaVocabularyMethod, TiedHeadMethod
from gamma_vllm.format_conversion import OtherFormat, in_our_order, is_convertible, read_other_format
from gamma_vllm.linear import GammaLinearMethod
from gamma_vllm.moe import ExpertModules, GammaMoEMethod
from gamma_vllm.pieces import GammaPiecesMethod
from gamma_vllm.shards import CheckpointModule
from gamma_vllm.weight_stream import (
    ExpertPlace,
    StreamMapper,
    load_experts,
    turn_candidates,
    turn_zero_points,
    with_weight,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["GammaConfig"]

_DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of the layers of a draft model for speculative decoding."""

_USUAL_FUSION = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""For model classes that fuse these layers and have no `packed_modules_mapping` that says it (StableLM)."""

_GPT_OSS_NAMES = ("w13_weight", "w2_weight")
"""What its model class renames gate_up_proj and down_proj of an expert to."""

_BLOCK_NUMBER = re.compile(r"\.layers\.(\d+)\.")
_BLOCK = re.compile(r"(.*?\.)?\d+\.")
_HEAD_NAME = "lm_head"
_EMBEDDING_NAMES = ("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "embeddings")
"""Names of input embeddings in checkpoints, for models that build the layer without telling its name."""


class GammaConfig(QuantizationConfig):
    """The checkpoint's `quantization_config` as vLLM asks for it.

    `modules` maps vLLM's names of modules (before fusion) to how the checkpoint stores them. A layer without
    an entry is refused: nothing is guessed.
    """

    NAME = CheckpointConfig.QUANT_METHOD

    def __init__(self, checkpoint: CheckpointConfig | None = None):
        super().__init__()
        self.checkpoint: CheckpointConfig
        self.manifest: Manifest | None = None
        self.modules: dict[str, CheckpointModule] = {}
        self.served: ServedBank | None = None
        self.declaration: dict[str, Any] | None = None
        self.other_format: OtherFormat | None = None
        self.ties_embeddings = False
        self.keys_are_values = False
        self.makes_scores_of_rows = False
        self.blocks: int | None = None
        self.expert_places: dict[str, ExpertPlace] = {}
        self.turned_heads: dict[str, int] = {}
        if checkpoint is not None:
            self._set(checkpoint)

    def _set(self, checkpoint: CheckpointConfig) -> None:
        self.checkpoint = checkpoint
        self.modules = {name: CheckpointModule(name, module) for name, module in checkpoint.modules.items()}

    def __repr__(self) -> str:
        return f"GammaConfig({len(self.modules)} modules, manifest {self.checkpoint.manifest_digest})"

    def get_name(self) -> str:
        return self.NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # each kernel says itself where it runs

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GammaConfig":
        """Raises ContractError on an unknown version, an unknown key, or values that are not allowed.

        The declaration of another method is read with its tensors, in `maybe_update_config`.
        """
        if is_convertible(config):
            made = cls()
            made.declaration = config
            return made
        return cls(CheckpointConfig.parse(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Take over checkpoints of other methods, but only when `--quantization gamma` asks for it."""
        return cls.NAME if user_quant == cls.NAME and hf_quant_cfg and is_convertible(hf_quant_cfg) else None

    def maybe_update_config(
        self, model_name: str, hf_config: "PreTrainedConfig | None" = None, revision: str | None = None
    ) -> None:
        """Refuse a checkpoint that contradicts itself. vLLM calls this before it makes the model.

        A model folder without quantization_config must be a bank: then a manifest is asked for.
        """
        if hf_config is not None:
            text = hf_config.get_text_config()
            self.ties_embeddings = bool(getattr(text, "tie_word_embeddings", False))
            self.keys_are_values = bool(getattr(text, "attention_k_eq_v", False))
            self.blocks = getattr(text, "num_hidden_layers", None)
            self.makes_scores_of_rows = any(getattr(of, "classifier_from_token", None) for of in (hf_config, text))
            if any(name.startswith("Llama4") for name in getattr(hf_config, "architectures", None) or ()):
                self.turned_heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        folder = Path(model_name)
        if self.declaration is not None:
            require_weight_mapper("serving a checkpoint of another format")
            self.other_format = read_other_format(folder, self.declaration)
            self._set(self.other_format.checkpoint)
        elif not self.modules:
            require_weight_mapper("serving from a bank")
            self.served = find_served_bank(folder, hf_config)
            self.manifest = self.served.manifest
            self._set(CheckpointConfig.of_manifest(self.manifest))
        elif folder.is_dir():
            self.manifest = _check_folder(folder, self.checkpoint)
        if self.manifest is not None:
            announce(self.manifest, model_name)

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """vLLM passes all weights through this: from a bank, the chosen candidates take the place of the weights,
        tensors of other methods are put into our order, and some experts are loaded here."""
        mapper = QuantizationConfig.get_checkpoint_weight_mapper()
        steps: list[Callable[[Any], Any]] = []
        if self.other_format is not None:
            steps.append(partial(in_our_order, self.other_format))
        if self.served is not None:
            steps.append(partial(chosen, self.served))
            if self.turned_heads:
                steps.append(partial(turn_candidates, self.checkpoint.modules, self.turned_heads))
        if self.makes_scores_of_rows and (module := self._head_module()).format.quantized:
            steps.append(partial(with_weight, module, not self.ties_embeddings))
        if self.turned_heads:
            steps.append(partial(turn_zero_points, self.checkpoint.modules, self.turned_heads))
        if self.expert_places:
            steps.append(partial(load_experts, self.expert_places))
        return StreamMapper(tuple(steps)) | mapper if steps else mapper

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename modules as the model class renames weights."""
        renamed = hf_to_vllm_mapper.apply_dict(self.modules)
        if len(renamed) != len(self.modules):
            raise ContractError(
                f"{len(self.modules)} modules of the checkpoint have only {len(renamed)} names in vLLM; "
                "this architecture cannot be served"
            )
        self.modules = renamed

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer. Raises ContractError naming the layer and the module that has no entry."""
        prefix = prefix.removeprefix(_DRAFT_PREFIX)
        if self._predicts(prefix):
            return _at_16_bits(layer)
        if isinstance(layer, ParallelLMHead):
            return self._lm_head(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding(prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        in_weights = self._in_weights(prefix)
        if self.checkpoint.channel_blocks is not None and (pieces := self._pieces_of(in_weights)):
            return GammaPiecesMethod(pieces, self.checkpoint.channel_blocks, self.checkpoint.dtype)
        copied = isinstance(layer, GateLinear) or _BLOCK.match(prefix) is None
        if (copied and self.modules.keys().isdisjoint(self._names_of(prefix))) or not self._declares_any_of(prefix):
            # Routers, vision towers and what stands beside the blocks are copied, they are no modules of the program.
            return UnquantizedLinearMethod()
        modules = self._modules_of(in_weights)
        if any(module.format.quantized for module in modules):
            return GammaLinearMethod(modules, self.checkpoint.dtype)
        return UnquantizedLinearMethod()

    def _predicts(self, prefix: str) -> bool:
        """Whether the layer is of those that predict further tokens (MTP): a block after the last, copied as it is."""
        number = _BLOCK_NUMBER.search(prefix)
        return number is not None and self.blocks is not None and int(number[1]) >= self.blocks

    def _declares_any_of(self, prefix: str) -> bool:
        """Whether the declaration is about this part of the model at all, `model` or `language_model`."""
        root = prefix.partition(".")[0] + "."
        return any(f"{name}.".startswith(root) for name in self.modules)

    def _modules_of(self, prefix: str) -> list[CheckpointModule]:
        """The checkpoint's modules that vLLM joins into the layer `prefix`, in its order. Raises ContractError."""
        names = self._names_of(prefix)
        absent = [name for name in names if name not in self.modules]
        if absent:
            raise ContractError(
                f"layer {prefix}: quantization_config has no entry for {', '.join(absent)}; every linear "
                "module needs one, also at 16 bits; export the checkpoint again"
            )
        return [self.modules[name] for name in names]

    def _names_of(self, prefix: str) -> list[str]:
        if prefix in self.modules:
            return [prefix]
        parent, _, leaf = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(leaf) or _USUAL_FUSION.get(leaf) or [leaf]
        names = [f"{parent}.{name}" if parent else name for name in joined]
        if self.keys_are_values and f"{parent}.v_proj" in names and f"{parent}.v_proj" not in self.modules:
            names = [f"{parent}.k_proj" if name == f"{parent}.v_proj" else name for name in names]  # loaded twice
        return names

    def _in_weights(self, prefix: str) -> str:
        """The layer by the name of its weights, whose parent may have another in vLLM: Granite's `mamba` is `mixer`, of
        Falcon-H1's `self_attn` nothing is said."""
        names, (parent, _, leaf) = self._names_of(prefix), prefix.rpartition(".")
        block = _BLOCK.match(prefix)
        if block is None or not self.modules.keys().isdisjoint(names):
            return prefix
        here = (name.partition(".rows.")[0].rpartition(".") for name in self.modules if name.startswith(block[0]))
        leaves, parents = {name.rpartition(".")[2] for name in names}, set()
        for own_parent, _, own_leaf in here:
            if own_parent == parent:
                return prefix
            if own_leaf in leaves and ".experts." not in own_parent:
                parents.add(own_parent)
        return f"{parents.pop()}.{leaf}" if len(parents) == 1 else prefix

    def _pieces_of(self, prefix: str) -> list[list[CheckpointModule]]:
        """The modules that vLLM joins into the layer `prefix`, piece by piece; empty if they are not cut."""
        parent, _, leaf = prefix.rpartition(".")
        whole = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        if self.checkpoint.channel_blocks is None or row_block_name(whole[0], 0) not in self.modules:
            return []
        pieces = [
            [row_block_name(name, number) for name in whole] for number in range(self.checkpoint.channel_blocks.blocks)
        ]
        return [[self.modules[name] for name in names] for names in pieces]

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase:
        if not any(name.startswith(f"{prefix}.") for name in self.modules):
            return UnquantizedFusedMoEMethod(layer.moe_config)  # in a layout of their own, copied
        leaves = [name for name in (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name) if name]
        numbers = range(layer.moe_config.num_logical_experts)
        stacked = ".block_sparse_moe." in prefix and leaves[0] == "gate_proj"  # Granite's hybrid model
        if fused := f"{prefix}.0.{_GPT_OSS_NAMES[0]}" in self.modules:
            pairs = [[self.modules[f"{prefix}.{i}.{name}"] for name in _GPT_OSS_NAMES] for i in numbers]
            experts = [ExpertModules((w13,), w2) for w13, w2 in pairs]
        else:
            experts = [
                ExpertModules(
                    tuple(self._modules_of(f"{prefix}.{i}.{leaf}")[0] for leaf in leaves),
                    self._modules_of(f"{prefix}.{i}.{layer.ckpt_down_proj_name}")[0],
                )
                for i in numbers
            ]
        if fused or stacked:  # vLLM reads them from stacks only, those of 16 bits too
            self._load_here(layer, experts)
            return GammaMoEMethod(layer, experts, self.checkpoint.dtype)
        if any(module.format.quantized for expert in experts for module in (*expert.w13, expert.w2)):
            return GammaMoEMethod(layer, experts, self.checkpoint.dtype)
        return UnquantizedFusedMoEMethod(layer.moe_config)

    def _load_here(self, layer: RoutedExperts, experts: list[ExpertModules]) -> None:
        """Let the tensors of `experts` be loaded by `load_experts`."""
        for number, expert in enumerate(experts):
            of_w13 = zip(expert.w13, ("w1", "w3"), strict=False)
            self.expert_places |= {m.name: ExpertPlace(layer, "w13", shard, number) for m, shard in of_w13}
            self.expert_places[expert.w2.name] = ExpertPlace(layer, "w2", "w2", number)

    def _head_module(self) -> CheckpointModule:
        """The module whose rows are those of the lm_head."""
        if self.ties_embeddings:
            return self._embedding_module("")
        return self._modules_of(next((n for n in self.modules if n.rpartition(".")[2] == _HEAD_NAME), _HEAD_NAME))[0]

    def _lm_head(self, prefix: str) -> QuantizeMethodBase:
        if _pools():
            return TiedHeadMethod()  # which vLLM throws away
        if prefix not in self.modules and self.ties_embeddings:
            if self._embedding_module("").format.quantized:
                return TiedHeadMethod()
            return UnquantizedEmbeddingMethod()  # shares the embedding's weight, which has its own entry
        # Some models do not tell its name, and those that predict further tokens have it beside no language_model.
        module = self.modules[prefix] if prefix in self.modules else self._head_module()
        return self._vocabulary(module, multiplies=True)

    def _embedding(self, prefix: str) -> QuantizeMethodBase:
        if prefix and prefix not in self.modules and prefix.rpartition(".")[2] not in _EMBEDDING_NAMES:
            return UnquantizedEmbeddingMethod()  # not of the input: Gemma 4's embeddings of each block
        module, ties, pools = self._embedding_module(prefix), self.ties_embeddings, _pools()
        lends = pools and ties and self.makes_scores_of_rows
        return self._vocabulary(module, gathers=True, multiplies=ties and not pools, lends_weight=lends)

    def _embedding_module(self, prefix: str) -> CheckpointModule:
        if prefix:
            return self._modules_of(prefix)[0]
        # Llama does not say which of its modules this is.
        modules = [m for name, m in self.modules.items() if name.rpartition(".")[2] in _EMBEDDING_NAMES]
        if len(modules) != 1:
            found = ", ".join(m.name for m in modules) or "no entry"
            raise ContractError(
                f"the input embedding: quantization_config has {found} for a module named "
                f"{', '.join(_EMBEDDING_NAMES)}, exactly one is needed; export the checkpoint again"
            )
        return modules[0]

    def _vocabulary(self, module: CheckpointModule, **uses: bool) -> QuantizeMethodBase:
        if not module.format.quantized:
            return UnquantizedEmbeddingMethod()
        return GammaVocabularyMethod(module, self.checkpoint.dtype, **uses)


def _at_16_bits(layer: nn.Module) -> QuantizeMethodBase | None:
    """The method of a layer that no module of the program is a part of."""
    if isinstance(layer, VocabParallelEmbedding):
        return UnquantizedEmbeddingMethod()
    if isinstance(layer, RoutedExperts):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _pools() -> bool:
    """Whether the engine that is being made embeds or scores texts, for which it has no lm_head."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.model_config is not None and config.model_config.runner_type == "pooling"


def _check_folder(folder: Path, declared: CheckpointConfig) -> Manifest:
    """Refuse a folder whose config, manifest and weights (none are needed for a dummy load) disagree."""
    if any(folder.glob("*.safetensors")):
        config, manifest = check_checkpoint(folder)
    else:
        manifest = Manifest.read(folder / MANIFEST_NAME)
        config = CheckpointConfig.of_manifest(manifest)
    for name in sorted(config.modules.keys() | declared.modules.keys()):
        ours, theirs = declared.modules.get(name), config.modules.get(name)
        if ours != theirs:
            raise ContractError(f"{name}: vLLM was given {ours}, {folder} says {theirs}")
    if config != declared:
        raise ContractError(f"{folder}: its manifest is not the one that its config.json was written for")
    return manifest
