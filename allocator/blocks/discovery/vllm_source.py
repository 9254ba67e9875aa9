"""What vLLM makes of an architecture, read from its source without importing it, which takes half a minute.

Which linear layer stands for which weight, what it fuses, whether it hands on the quantization: all of it is written in
the model's file, in calls such as `self.o_proj = RowParallelLinear(..., quant_config=quant_config)`.
"""

import ast
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from allocator.contract.errors import InputError

__all__ = [
    "LayerCall", "ServedModel", "language_model_of", "registered", "served_architectures", "served_model",
    "vllm_version",
]  # fmt: skip

_TABLES = ("_TEXT_GENERATION_MODELS", "_SEQUENCE_CLASSIFICATION_MODELS", "_MULTIMODAL_MODELS",
           "_TRANSFORMERS_SUPPORTED_MODELS")  # fmt: skip
_FOLLOWED = ("vllm.model_executor.models", "vllm.models.", "vllm.model_executor.layers.mamba.")
"""Modules whose layers are those of the models that import them."""
_LAYERS = {
    "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear", "ReplicatedLinear",
    "GateLinear", "ParallelLMHead", "VocabParallelEmbedding", "FusedMoE", "SharedFusedMoE",
}  # fmt: skip


_LOADED_INTO = {"expert_bias": "e_score_correction_bias"}
"""Attributes of checkpoints that vLLM loads into parameters of another name."""


@dataclass(frozen=True)
class LayerCall:
    """A layer class by name, and whether it is given the model's quantization, and its own name."""

    kind: str
    quantized: bool
    named: bool = True


@dataclass
class ServedModel:
    """A model class of vLLM. `layers` are by the attribute that holds them, `packed` is its packed_modules_mapping.
    `float32` are the attributes that it keeps in float32 whatever the model's dtype.

    `by_transformers`: vLLM runs the code of transformers with its own layers in it. `windows_by_layer`: its
    attention is told a sliding window for each layer.
    """

    by_transformers: bool
    packed: dict[str, list[str]] = field(default_factory=dict)
    layers: dict[str, LayerCall] = field(default_factory=dict)
    windows_by_layer: bool = False
    float32: set[str] = field(default_factory=set)

    def in_float32(self, tensor: str) -> bool:
        """Whether vLLM keeps the tensor of that name in float32."""
        parent, _, leaf = tensor.rpartition(".")
        attribute = parent.rpartition(".")[2] if leaf == "weight" else leaf
        names = {attribute, attribute.removesuffix("_log"), _LOADED_INTO.get(attribute, attribute)}
        return not names.isdisjoint(self.float32)  # A_log is loaded into A


def vllm_version() -> str:
    """The installed release, without what a build adds. Raises InputError where there is none."""
    _folder()
    return version("vllm").partition("+")[0]


def served_architectures() -> dict[str, tuple[str, str]]:
    """Architecture -> module and class, as vLLM registers them."""
    return registered((_folder() / "model_executor" / "models" / "registry.py").read_text(encoding="utf-8"))


def registered(registry: str) -> dict[str, tuple[str, str]]:
    """Architecture -> module and class, by the source of vLLM's registry."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(registry).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in _TABLES:
            table = node.value
            assert isinstance(table, ast.Dict)
            for key, value in zip(table.keys, table.values, strict=True):
                if key is not None:
                    module, name = ast.literal_eval(value)[:2]
                    found.setdefault(ast.literal_eval(key), (module, name))
    return found


def language_model_of(architecture: str) -> str | None:
    """The architecture that vLLM runs the language model of a multimodal one with, where its source names just one."""
    module = served_architectures()[architecture][0]
    named = {
        ast.literal_eval(keyword.value)[0]
        for file in _files(f"vllm.model_executor.models.{module}")
        for call in ast.walk(_parse(file))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "architectures" and isinstance(keyword.value, ast.List) and "Causal" in ast.unparse(keyword)
    }
    return str(named.pop()) if len(named) == 1 else None


@cache
def served_model(architecture: str) -> ServedModel | None:
    """What vLLM's source says of an architecture; None if it has none of that name."""
    registered = served_architectures().get(architecture)
    if registered is None:
        return None
    module, name = registered
    if module == "transformers":
        return ServedModel(by_transformers=True, windows_by_layer=True)
    model = ServedModel(by_transformers=False)
    trees = _trees(module)
    for tree in trees:  # the model's own file first: what it imports may have layers of the same name
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and any(k.arg == "per_layer_sliding_window" for k in call.keywords):
                model.windows_by_layer = True
        model.float32 |= _in_float32(tree)
        layers = _layers(tree)
        named = {attribute for attribute, layer in layers if layer.named}
        for attribute, layer in layers:
            model.layers.setdefault(attribute, replace(layer, named=attribute in named))
    model.packed = _stacked(trees[0]) | _packed(trees, name) | _packed_later(trees[0])
    return model


def _folder() -> Path:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise InputError("vLLM is not installed here, so what it makes of this model cannot be read")
    return Path(spec.origin).parent


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _files(module: str) -> list[Path]:
    path = _folder().parent / module.replace(".", "/")
    if path.is_dir():
        return sorted(path.rglob("*.py"))
    return [path.with_suffix(".py")] if path.with_suffix(".py").exists() else []


def _trees(module: str) -> list[ast.Module]:
    """The files of a module and of the model files that it imports classes from, nearest first."""
    package = "vllm.model_executor.models"
    waiting, seen, found = [module if module.startswith("vllm.") else f"{package}.{module}"], set(), []
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        for path in _files(name):
            tree = _parse(path)
            found.append(tree)
            for node in tree.body:
                if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                    parent = name if path.parent.name == name.rpartition(".")[2] else name.rpartition(".")[0]
                    waiting.append(f"{parent}.{node.module}")
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_FOLLOWED):
                    waiting.append(node.module or "")
    skipped = ("interfaces", "interfaces_base", "utils", "registry", "adapters")
    return [t for t in found if t not in [x for s in skipped for p in _files(f"{package}.{s}") for x in [_parse(p)]]]


def _layers(tree: ast.Module) -> list[tuple[str, LayerCall]]:
    makers = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        target, call = node.targets[0], node.value
        kind = call.func.id if isinstance(call.func, ast.Name) else ""
        if isinstance(call.func, ast.Attribute) and call.func.attr in makers:  # self.create_qkvz_proj(...)
            kind = next((k for k in map(_returned, ast.walk(makers[call.func.attr])) if k in _LAYERS), "")
        if isinstance(target, ast.Attribute) and kind in _LAYERS:
            keywords = {k.arg: k.value for k in call.keywords}
            given = keywords.get("quant_config")
            quantized = given is not None and not (isinstance(given, ast.Constant) and given.value is None)
            named = "prefix" in keywords or isinstance(call.func, ast.Attribute)
            found.append((target.attr, LayerCall(kind, quantized, named)))
    return found


def _in_float32(tree: ast.Module) -> set[str]:
    """Attributes assigned parameters, or routers, of that dtype by name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            text = ast.unparse(node.value)
            parameter = text.startswith("nn.Parameter(") and " dtype=torch.float32" in text
            if parameter or (text.startswith("GateLinear(") and "params_dtype=torch.float32" in text):
                found.add(node.targets[0].attr)
    return found


def _returned(node: ast.AST) -> str:
    """The class that a return statement makes an object of."""
    value = node.value if isinstance(node, ast.Return) else None
    return value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""


def _packed(trees: list[ast.Module], name: str) -> dict[str, list[str]]:
    """`packed_modules_mapping` of the class, or of the nearest class above it that has one."""
    classes = {node.name: node for tree in reversed(trees) for node in tree.body if isinstance(node, ast.ClassDef)}
    waiting = [name]
    while waiting:
        node = classes.get(waiting.pop(0))
        if node is None:
            continue
        for statement in node.body:
            target: ast.expr | None = None
            if isinstance(statement, ast.Assign):
                target = statement.targets[0]
            elif isinstance(statement, ast.AnnAssign):
                target = statement.target
            if isinstance(target, ast.Name) and target.id == "packed_modules_mapping" and statement.value is not None:  # type: ignore[attr-defined]
                return dict(ast.literal_eval(statement.value))  # type: ignore[attr-defined]
        waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return {}


def _stacked(tree: ast.Module) -> dict[str, list[str]]:
    """What weights are loaded into: `orig_to_new_stacked={".q_proj": (".qkv_proj", "q"), ...}`."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "orig_to_new_stacked" and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and isinstance(value, ast.Tuple)
                    and isinstance(value.elts[0], ast.Constant)
                ):
                    parts = found.setdefault(str(value.elts[0].value).strip("."), [])
                    if (part := str(key.value).strip(".")) not in parts:
                        parts.append(part)
    return found


def _packed_later(tree: ast.Module) -> dict[str, list[str]]:
    """What a constructor adds: `self.packed_modules_mapping["gate_up_proj"] = [...]`."""
    found = {}
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Subscript) and ast.unparse(target.value).endswith("packed_modules_mapping"):
            assert isinstance(node, ast.Assign)
            found[ast.literal_eval(target.slice)] = ast.literal_eval(node.value)
    return found
