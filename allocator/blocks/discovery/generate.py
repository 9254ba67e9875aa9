"""The rules of an architecture, found: its tensors from transformers, what becomes of them from vLLM.

A rule that is found is checked at once: for configs of other sizes and other switches, the tensors that it says are
those that transformers makes.
"""

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

from allocator.blocks.discovery import told
from allocator.blocks.discovery.expressions import Expressions, Trace
from allocator.blocks.discovery.layer_kinds import layer_kinds_rule, window_rule
from allocator.blocks.discovery.probes import BLOCKS, PROBES, Probe, blocks_key, config_class, probe, sizes_of
from allocator.blocks.discovery.switches import with_switches
from allocator.blocks.discovery.tensors import (
    ProbedTensor,
    check_rules,
    experts_of,
    module_name,
    numbered,
    parent_name,
    probed_tensors,
)
from allocator.blocks.discovery.vllm_source import ServedModel, served_model
from allocator.contract.errors import InputError
from allocator.contract.resident import Split
from allocator.model.architectures import Architecture, ExpertLayout
from allocator.model.derived_sizes import DERIVED
from allocator.model.expert_stacks import matrices_of

__all__ = ["find_architecture"]

_QKV = ("q_proj", "k_proj", "v_proj")
_EXPERT_LEAVES = dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "w13")
_EXPERT_LEAVES |= dict.fromkeys(("down_proj", "w2"), "w2")
_SPLITS: dict[str, Split] = {
    "ColumnParallelLinear": "column",
    "MergedColumnParallelLinear": "column",
    "QKVParallelLinear": "qkv",
    "RowParallelLinear": "row",
    "ReplicatedLinear": "replicated",
}
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_BY_TRANSFORMERS = {"qkv_proj": list(_QKV), "gate_up_proj": ["gate_proj", "up_proj"]}
"""What vLLM fuses where it runs the code of transformers."""
_ALWAYS_GIVEN = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
"""Every config.json has them, but for those whose language model is a part: it leaves out what is default."""


def find_architecture(model_type: str, architecture: str, inside_another: bool = False) -> Architecture:
    """The rules of the model class `architecture`, whose config class has `model_type`.

    `inside_another`: its config is a part of that of a multimodal model. Raises InputError saying what is
    missing for it to be learned and served.
    """
    served = served_model(architecture)
    if served is None:
        raise InputError(f"{architecture}: vLLM has no model of this name, so nothing could serve it")
    try:
        return _Finder(model_type, architecture, served, inside_another).find()
    except InputError:
        raise
    except Exception as error:  # transformers has as many ways to fail as it has models
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise InputError(f"{architecture}: its structure could not be found ({reason})") from error


class _Finder:
    def __init__(self, model_type: str, architecture: str, served: ServedModel, inside_another: bool) -> None:
        import transformers

        self.architecture, self.served = architecture, served
        self.kind = config_class(model_type)
        self.inside_another = inside_another or model_type.endswith("_text")
        self.known = {key.name for key in fields(self.kind)}
        self.model_class = getattr(transformers, architecture, None)
        if self.model_class is None:
            raise InputError(f"{architecture}: transformers has no class of this name")
        self.by_kind = told.BY_KIND.get(model_type, {})
        fixed = told.FIXED.get(model_type, {})
        self.sizes = {k: v for k, v in sizes_of(self.kind, self.by_kind).items() if k not in fixed}
        self.sparse = told.sparse_rules(self.kind) | fixed
        self.mixes_kinds = model_type in told.KINDS
        if self.mixes_kinds:
            self._mix_kinds(told.KINDS[model_type])
        self.probes = self._probes({})
        if set(self.probes[0].layer_kinds or ()) == {"linear_attention"}:
            # Without attention by default: with it, every second block shows what that has.
            self.mixes_kinds = True
            self._mix_kinds(["linear_attention", "full_attention"])
            self.probes = self._probes({})
        self.first = self.probes[0]
        constant = {
            name: value
            for name in sorted(self.known - self.sizes.keys())
            if type(value := told.value_of(self.first.config, name)) is int and name not in ("num_hidden_layers",)
        }
        self.derived = {key: size for key, size in DERIVED.items() if set(size.of) <= self.known}
        computed = {
            key: tuple(size.size(p.config.to_dict()) for p in self.probes) for key, size in self.derived.items()
        }
        self.expressions = Expressions(self.sizes, constant, computed, {"num_hidden_layers": BLOCKS})
        self.modules: dict[str, ProbedTensor] = {}
        self.every: list[ProbedTensor] = []
        self.experts: Trace = ()
        self.expert_rules: dict[str, Any] | None = None
        self.used: set[str] = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}

    def find(self) -> Architecture:
        tensors, switches = with_switches(self.kind, self.sizes, self.probes, self._probes)
        self.used |= switches
        embedding, head = self.first.embedding + ".weight", self.first.head + ".weight"
        inside = [t for t in tensors if t.name not in (embedding, head)]
        inside = [part for t in inside for part in self._unstacked(t)]
        sparse_blocks = {b for t in inside if "{e}" in t.name for b in t.blocks}
        experts = self.expert_rules = self._experts(inside, sparse_blocks)
        self.every = [t for t in inside if self._is_module(t)]
        self.modules = {module_name(t): t for t in self.every}
        linears = [r for t in self._in_order(inside) if self._is_module(t) for r in self._linear(t, sparse_blocks)]
        others = [self._other(t, sparse_blocks) for t in inside if not self._is_module(t)]
        plan_only = plan_only_when = None
        if bias := next((t for t in inside if t.name == f"{self.first.head}.bias"), None):
            plan_only = "its lm_head has a bias, which learning does not take into account"
            plan_only_when = bias.when
        if any(t.name.startswith(f"{self.first.embedding}.") for t in inside):
            plan_only = "its embedding does more than to look up rows, which learning does not take into account"
        shapes = {t.name: t.shape for t in tensors}
        where = ["vocab_size", "hidden_size"]
        rules: dict[str, Any] = {
            "block": f"{self.first.block_prefix}.{{i}}",
            "block_count": blocks_key(self.kind),
            "linears": linears,
            "embedding": {"name": self.first.embedding, "shape": where}
            | self._why_16("embed_tokens", "VocabParallelEmbedding"),
            "lm_head": {"name": self.first.head, "shape": where} | self._why_16("lm_head", "ParallelLMHead"),
            "others": others,
            "experts": experts,
            "tied_by_default": bool(getattr(self.kind(), "tie_word_embeddings", False)),
            "window": window_rule(self.kind, self.first.layer_kinds, self.served.windows_by_layer),
            "plan_only": plan_only,
            "plan_only_when": plan_only_when,
            "attention": "mla" if "kv_lora_rank" in self.known else "grouped",
            "defaults": {},
            "of_full_attention": self.by_kind,
        }
        if [self._text(trace) for trace in shapes[embedding]] != where:
            raise InputError(f"{self.architecture}: its embedding is not one row of hidden_size a token")
        of_layers = set(self.first.layer_kinds or ())
        self.used |= {"num_attention_heads", "num_key_value_heads", "head_dim"}
        self.used |= {"max_position_embeddings", "original_max_position_embeddings"}  # LongRoPE
        self.used |= {"sliding_window"} & self.known
        by_kind = any("kinds" in rule for rule in linears + others) or rules["window"] == "pattern"
        if by_kind or of_layers - {"full_attention", "sliding_attention"}:
            rules["layer_kinds"] = layer_kinds_rule(self.kind, self.first.layer_kinds or [], self.mixes_kinds)
        rules["defaults"] = self._defaults(experts)
        found = Architecture.model_validate({k: v for k, v in rules.items() if v not in (None, False, {})})
        for one in self.probes:
            check_rules(found, one, self.architecture)
        return found

    def _mix_kinds(self, kinds: list[str]) -> None:
        key = self.kind.attribute_map.get("layer_types", "layer_types")
        self.sparse |= {key: kinds * (BLOCKS // len(kinds))}

    # Tensors

    def _probes(self, changes: dict[str, Any], count: int = PROBES) -> list[Probe]:
        models = []
        for number in range(count):
            values = {name: trace[number] for name, trace in self.sizes.items()}
            try:
                models.append(probe(self.kind, self.model_class, values | self.sparse | changes))
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                raise InputError(
                    f"{self.architecture}: transformers does not build it in other sizes ({reason})"
                ) from error
        return models

    def _in_order(self, tensors: list[ProbedTensor]) -> list[ProbedTensor]:
        """As the model has them; of experts gate, up and down, which is vLLM's order in a fused layer."""
        places: dict[str, int] = {}
        for name, place in self.first.in_order.items():
            places.setdefault(numbered(f"{name}.weight", self.first), place)
        leaves = list(_EXPERT_LEAVES)
        parents: dict[str, int] = {}
        for name, place in places.items():
            parents.setdefault(parent_name(name), place)

        def place_of(tensor: ProbedTensor) -> tuple[int, bool, int]:
            if "{e}" in tensor.name:
                return len(places), False, leaves.index(tensor.name.split(".")[-2])
            # What takes the outputs of its neighbours comes after them, in whatever order a class makes them.
            last = self._is_module(tensor) and self._split(tensor) == "row"
            return parents.get(parent_name(tensor.name), len(places)), last, places.get(tensor.name, len(places))

        return sorted(tensors, key=place_of)

    def _unstacked(self, tensor: ProbedTensor) -> list[ProbedTensor]:
        """The matrices of which a tensor `[experts, rows, in_features]` is made, in the layout of `nn.Linear`."""
        modules = () if len(tensor.shape) != 3 or self.layout is None else matrices_of(tensor.name, self.layout)
        if not modules:
            return [tensor]
        sizes = tensor.shape[1:] if self.layout == "rows" else tensor.shape[:0:-1]
        rows = tuple(size // len(modules) for size in sizes[0])
        return [replace(tensor, name=f"{module}.weight", shape=(rows, sizes[1]), linear=True) for module in modules]

    @cached_property
    def layout(self) -> ExpertLayout | None:
        """How the experts of a block lie in one tensor: with rows and columns as linear modules have, or the other way
        round. None if they do not, or in a way that is not known."""
        of = [(t.name, t.shape) for t in probed_tensors(self.probes) if len(t.shape) == 3]
        gate_up, down = (
            next((shape for name, shape in of if len(matrices_of(name, "rows")) == parts), None) for parts in (2, 1)
        )
        if gate_up is None or down is None:
            return None
        if gate_up[2] == down[1] and gate_up[1] == tuple(2 * size for size in down[2]):
            return None if self.first.interleaved else "rows"
        if gate_up[1] == down[2] and gate_up[2] == tuple(2 * size for size in down[1]):
            return "interleaved" if self.first.interleaved else "columns"
        return None

    def _is_module(self, tensor: ProbedTensor) -> bool:
        return tensor.linear and len(tensor.shape) == 2 and bool(tensor.blocks)

    def _linear(self, tensor: ProbedTensor, sparse: set[int]) -> list[dict[str, Any]]:
        """The rules of a module: two if it is fused with one that is not always there."""
        name = module_name(tensor).removeprefix(f"{self.first.block_prefix}.{{i}}.")
        parent, _, leaf = name.rpartition(".")
        rule: dict[str, Any] = {"name": name, "shape": [self._text(trace) for trace in tensor.shape]}
        where = self._where(tensor, sparse)
        if tensor.shape[0] == self.experts and "{e}" not in name:
            where |= {"why_16": "a router says which experts a token takes"}
        if "{e}" in name:
            stack = _EXPERT_LEAVES.get(leaf)
            if stack is None:
                raise InputError(f"{self.architecture}: experts of {leaf} are not known to vLLM's fused layer")
            rule |= {"split": "expert_column" if stack == "w13" else "expert_row"}
            return [rule | {"fused": f"{parent.removesuffix('.{e}')}.{stack}"} | where]
        fused = self._fused(parent_name(tensor.name), leaf)
        if fused is None:
            return [rule | self._alone(leaf) | where]
        whole, split, when = fused
        keys = {b for t in self._named(f"{parent_name(tensor.name)}.k_proj") for b in t.blocks}
        if leaf == "q_proj" and (lonely := tuple(b for b in tensor.blocks if b not in keys)):
            own = replace(tensor, blocks=tuple(b for b in tensor.blocks if b in keys))
            shared = replace(tensor, blocks=lonely)
            return [*self._linear(own, sparse), rule | self._alone(leaf) | self._where(shared, sparse)]
        if leaf == "k_proj" and self._are_values(tensor):
            split = "key_value"
        together = rule | {"split": split, "fused": f"{parent}.{whole}" if parent else whole}
        if when is None or tensor.when is not None:
            return [together | where]
        return [together | where | {"when": when}, rule | self._alone(leaf) | where | {"unless": when}]

    def _fused(self, parent: str, leaf: str) -> tuple[str, Split, str | None] | None:
        """The vLLM layer that the module `leaf` of `parent` becomes a part of, how it is cut there, and the key without
        which another part is missing; None for a layer of its own."""
        packed = _BY_TRANSFORMERS if self.served.by_transformers else self.served.packed
        for whole, parts in packed.items():
            beside = [self.modules.get(f"{parent}.{part}") for part in parts]
            if leaf not in parts or len(parts) < 2 or None in beside:
                continue
            when = next((key for part in parts if (key := self._condition(f"{parent}.{part}"))), None)
            if list(parts) == list(_QKV):
                return whole, "kv" if leaf in _QKV[1:] else "column", when
            known = self.served.by_transformers or whole in self.served.layers
            return whole, "column" if known else "replicated", when
        return None

    def _named(self, module: str) -> list[ProbedTensor]:
        """Its tensors of all kinds of blocks."""
        return [t for t in self.every if module_name(t) == module]

    def _condition(self, module: str) -> str | None:
        """The key without which the module is in no block."""
        keys = {t.when for t in self._named(module)}
        return keys.pop() if len(keys) == 1 else None

    def _are_values(self, keys: ProbedTensor) -> bool:
        """Whether the keys are the values too: no values stand beside them where they are."""
        beside = self._named(f"{parent_name(keys.name)}.v_proj")
        where = {b for t in beside if keys.when is None or t.unless != keys.when for b in t.blocks}
        return not where.intersection(keys.blocks)

    def _alone(self, leaf: str) -> dict[str, Any]:
        """How a module is cut that is a layer of its own, and why it is not below 16 bits."""
        if self.served.by_transformers:
            plan = getattr(self.kind, "base_model_tp_plan", None) or {}
            style = next((plan[k] for k in plan if k.endswith(f".{leaf}")), "replicate")
            cut: Split = "row" if style.startswith("row") else "column" if style.startswith("col") else "replicated"
            return {"split": cut}
        layer = self.served.layers.get(leaf)
        if layer is None or layer.kind not in _SPLITS:
            return {"split": "replicated", "why_16": "vLLM has no quantized layer for it"}
        rule: dict[str, Any] = {"split": _SPLITS[layer.kind]}
        if layer.quantized and not layer.named:
            return rule | {"why_16": "vLLM builds this layer without its name"}
        return rule if layer.quantized else rule | {"why_16": "vLLM builds this layer without a quantization config"}

    def _split(self, tensor: ProbedTensor) -> Split:
        leaf = module_name(tensor).rpartition(".")[2]
        fused = self._fused(parent_name(tensor.name), leaf)
        split: Split = self._alone(leaf)["split"] if fused is None else fused[1]
        return split

    def _why_16(self, leaf: str, kind: str) -> dict[str, str]:
        calls = [call for name, call in self.served.layers.items() if call.kind == kind]
        named = self.served.layers.get(leaf)
        call = named if named is not None and named.kind == kind else calls[0] if calls else None
        if call is None or call.quantized:
            return {}
        what = "embedding" if kind == "VocabParallelEmbedding" else "lm_head"
        return {"why_16": f"vLLM builds this {what} without a quantization config"}

    def _other(self, tensor: ProbedTensor, sparse: set[int]) -> dict[str, Any]:
        rule: dict[str, Any] = {"name": tensor.name, "shape": [self._text(trace) for trace in tensor.shape]}
        parent, _, part = tensor.name.rpartition(".")
        layer = None if tensor.blocks else self.served.layers.get(parent.rpartition(".")[2])
        if layer is not None and layer.kind in (*_SPLITS, "VocabParallelEmbedding"):  # beside the blocks
            rule["split"] = _SPLITS.get(layer.kind, "embedding")
        weight = self.modules.get(parent)
        if part == "bias" and weight is not None and (split := self._split(weight)) in ("column", "kv", "qkv"):
            rule["split"] = split
        if "layout" in (self.expert_rules or {}) and tensor.name.endswith("_proj_bias"):
            rule["split"] = "expert_row" if part == "down_proj_bias" else "expert_column"
        if self.served.in_float32(tensor.name):
            rule["float32"] = True
        return rule | self._where(tensor, sparse)

    def _where(self, tensor: ProbedTensor, sparse: set[int]) -> dict[str, Any]:
        rule: dict[str, Any] = {key: value for key in ("when", "unless") if (value := getattr(tensor, key)) is not None}
        if not tensor.blocks or len(tensor.blocks) == BLOCKS:
            return rule
        here, kinds = set(tensor.blocks), self.first.layer_kinds
        dense = set(range(BLOCKS)) - sparse
        candidates: list[tuple[dict[str, Any], set[int]]] = []
        if sparse and dense:
            candidates += [({"blocks": "sparse"}, sparse), ({"blocks": "dense"}, dense)]
        if shared := set(range(BLOCKS - (told.value_of(self.first.config, "num_kv_shared_layers") or 0), BLOCKS)):
            candidates += [({"keys": "own"}, set(range(BLOCKS)) - shared), ({"keys": "shared"}, shared)]
        if kinds is not None:
            every = [set(range(BLOCKS)), *(s for _, s in candidates)]
            for rest, within in zip([{}, *(r for r, _ in candidates)], every, strict=True):
                named = sorted({kinds[b] for b in here})
                candidates.append((rest | {"kinds": named}, {b for b in within if kinds[b] in named}))
        for found, blocks in candidates:
            if blocks == here:
                return rule | found
        raise InputError(
            f"{self.architecture}: no key of its config says why {tensor.name} is in blocks "
            f"{', '.join(map(str, sorted(here)[:6]))}"
        )

    # Numbers

    def _text(self, trace: Trace) -> str:
        text = self.expressions.of(trace)
        if text is None:
            raise InputError(
                f"{self.architecture}: a size ({', '.join(map(str, trace))}) follows from no keys of its config"
            )
        self.used |= set(re.findall(r"[a-z_][a-zA-Z_0-9]*", text))
        return text

    def _experts(self, tensors: Iterable[ProbedTensor], sparse: set[int]) -> dict[str, Any] | None:
        if not sparse:
            return None
        counts = self.experts = tuple(experts_of(p) for p in self.probes)
        down = next(t for t in tensors if "{e}" in t.name and _EXPERT_LEAVES.get(t.name.split(".")[-2]) == "w2")
        if len(sparse) == BLOCKS:
            rule = "all"
        elif every_nth := self.known.intersection(told.EVERY_NTH):
            rule = every_nth.pop()
        elif (of_kind := self._kind_of(sparse)) is not None:
            rule = "kind"
        elif sparse == set(range(min(sparse), BLOCKS)):
            rule = "first_k_dense_replace"
        else:
            raise InputError(f"{self.architecture}: no key of its config says which blocks have experts")
        self.first_sparse = told.dense_blocks(self.kind, min(sparse))
        per_token = next((key for key in _PER_TOKEN if key in self.known), None)
        if per_token is None:
            raise InputError(f"{self.architecture}: no key of its config says how many experts a token takes")
        self.used |= {per_token} | ({rule} & self.known)
        keys = {"count": self._text(counts), "per_token": per_token, "size": self._text(down.shape[1]), "blocks": rule}
        if down.when is not None and rule == "all":
            keys["when"] = down.when
        if self.layout not in (None, "rows"):
            keys["layout"] = self.layout
        return keys | ({"kind": of_kind} if rule == "kind" else {})

    def _kind_of(self, blocks: set[int]) -> str | None:
        """The kind whose blocks are `blocks`, None if there is none."""
        kinds = self.first.layer_kinds or []
        return next((k for k in kinds if blocks == {i for i, kind in enumerate(kinds) if kind == k}), None)

    def _defaults(self, experts: dict[str, Any] | None) -> dict[str, int | str | bool]:
        """The value of each key that is used where config.json leaves it out."""
        defaults: dict[str, int | str | bool] = {}
        # Some classes have one size under two names, and write either.
        other_names = {key: own for key, own in self.kind.attribute_map.items() if key in self.used}
        for key in sorted(self.used | set(other_names.values())):
            if key in other_names:
                defaults[key] = other_names[key]
                continue
            values: list[Any] = []
            for number in range(PROBES):
                given = {n: t[number] for n, t in self.sizes.items() if n in self.known and n not in (key, "head_dim")}
                if key != "head_dim" and "head_dim" in self.known:
                    given["head_dim"] = self.sizes["head_dim"][number]
                try:
                    values.append(told.default_of(self.kind(**given), key, self.by_kind))
                except Exception:  # a class that cannot do without it has no default
                    values.append(None)
            if key == "head_dim" and None in values:
                defaults[key] = "hidden_size/num_attention_heads"
            elif key in _ALWAYS_GIVEN and not self.inside_another:
                continue
            elif isinstance(values[0], bool) or (isinstance(values[0], int) and len(set(values)) == 1):
                defaults[key] = values[0]
            elif None not in values and (text := self.expressions.of(tuple(values))) is not None:
                defaults[key] = text
        if "kv_lora_rank" in self.known:
            defaults["qk_head_dim"] = "qk_nope_head_dim+qk_rope_head_dim"
        if experts is not None:
            defaults.setdefault("intermediate_size", experts["size"])
            if experts["blocks"] == "first_k_dense_replace":
                defaults |= {"moe_layer_freq": 1}
                if other := next((key for key in told.DENSE_BLOCKS if key in self.known), None):
                    defaults |= {"first_k_dense_replace": other, other: getattr(self.kind(), other)}
                elif "first_k_dense_replace" not in self.known:
                    defaults["first_k_dense_replace"] = self.first_sparse
        for size in self.derived.values():
            defaults |= size.defaults
        return {key: value for key, value in defaults.items() if value is not False and value != key}
