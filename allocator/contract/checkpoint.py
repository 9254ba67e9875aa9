"""The checkpoint's `quantization_config`, and the check that a folder holds exactly what it declares."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from allocator.contract import compressed_tensors
from allocator.contract.channel_blocks import ChannelBlocks, Parents
from allocator.contract.documents import Digest, Document, Strict, explain, parse_json, read_text_limited
from allocator.contract.errors import ContractError
from allocator.contract.layout import Dtype16, ModuleFormat, module_tensors
from allocator.contract.manifest import MANIFEST_NAME, Manifest
from allocator.contract.safetensors_file import StoredTensor, read_folder_headers

__all__ = [
    "DIGESTS_NAME",
    "CheckpointConfig",
    "TensorDigests",
    "check_checkpoint",
    "check_digests",
    "digest_folder",
]


class CheckpointConfig(Strict):
    """`config.json["quantization_config"]` of a gamma checkpoint.

    `modules` lists every linear, embedding and lm_head module by its checkpoint name, 16-bit ones too, so that a
    module without an entry is an error and never a guess.
    """

    QUANT_METHOD: ClassVar[str] = "gamma"

    quant_method: Literal["gamma"] = "gamma"
    schema_version: Literal[1] = 1
    model_digest: Digest
    manifest_digest: Digest
    dtype: Dtype16
    channel_blocks: ChannelBlocks | None = None
    modules: dict[str, ModuleFormat]

    @model_validator(mode="after")
    def _originals_are_whole(self) -> "CheckpointConfig":
        self.parents.check()
        return self

    @property
    def parents(self) -> Parents:
        """The original model's modules, of which those here are rows."""
        return Parents({name: module.shape for name, module in self.modules.items()}, self.channel_blocks)

    @classmethod
    def parse(cls, config: dict[str, Any], where: str = "quantization_config") -> Self:
        """Check a decoded `quantization_config`. Raises ContractError."""
        version = config.get("schema_version")
        if type(version) is not int or version != 1:
            raise ContractError(
                f"{where}: schema_version is {version!r}, this release reads 1; "
                "export the checkpoint again or use the release that wrote it"
            )
        try:
            return cls.model_validate_json(json.dumps(config), strict=True)
        except ValidationError as error:
            raise ContractError(f"{where}: {explain(error)}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ContractError(f"{where}: not valid JSON ({error})") from None

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        return cls(
            model_digest=manifest.model.digest,
            manifest_digest=manifest.digest,
            dtype=manifest.dtype,
            channel_blocks=manifest.channel_blocks,
            modules=manifest.modules,
        )


def check_checkpoint(folder: Path) -> tuple[CheckpointConfig, Manifest]:
    """Check a checkpoint folder without reading weights: config, manifest and safetensors headers must agree.

    The folder may declare itself as `gamma` or as `compressed-tensors`; the tensors are the same.

    Raises ContractError naming the module and both values at the first disagreement: another manifest, a changed
    width, a missing, cut or additional tensor, a shape or dtype that contradicts the declaration.
    """
    config_path, manifest_path = folder / "config.json", folder / MANIFEST_NAME
    document = parse_json(read_text_limited(config_path, 64 << 20), config_path)
    quantization = document.get("quantization_config") if isinstance(document, dict) else None
    if not isinstance(quantization, dict):
        quantization = {}
    method = quantization.get("quant_method")
    if method == CheckpointConfig.QUANT_METHOD:
        config = CheckpointConfig.parse(quantization, f"{config_path}: quantization_config")
        manifest = Manifest.read(manifest_path)
        _check_same(config, manifest, config_path, manifest_path)
    elif method == compressed_tensors.QUANT_METHOD and manifest_path.exists():
        manifest = Manifest.read(manifest_path)
        config = CheckpointConfig.of_manifest(manifest)
        _check_same_declaration(quantization, manifest, config_path, manifest_path)
    else:
        raise ContractError(
            f"{config_path}: no quantization_config with quant_method gamma, nor one of compressed-tensors beside a "
            f"{MANIFEST_NAME}; this is no gamma checkpoint"
        )

    stored = read_folder_headers(folder)
    declared: set[str] = set()
    for name, module in config.modules.items():
        for tensor in module_tensors(name, module, config.dtype):
            declared.add(tensor.name)
            found = stored.get(tensor.name)
            if found is None:
                raise ContractError(
                    f"{folder}: {name} is declared at {module.num_bits} bits, but {tensor.name} is missing"
                )
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                raise ContractError(
                    f"{folder}: {tensor.name} is {found.dtype} {list(found.shape)} in {found.path.name}, "
                    f"{module.num_bits} bits at shape {list(module.shape)} need {tensor.dtype} {list(tensor.shape)}"
                )
    _check_others(folder, stored, declared, manifest)
    return config, manifest


def _check_same(config: CheckpointConfig, manifest: Manifest, config_path: Path, manifest_path: Path) -> None:
    for name in sorted(config.modules.keys() | manifest.modules.keys()):
        ours, theirs = config.modules.get(name), manifest.modules.get(name)
        if ours != theirs:
            raise ContractError(
                f"{name}: {config_path} says {_words(ours)}, {manifest_path} says {_words(theirs)}; "
                "export the checkpoint again"
            )
    if config != CheckpointConfig.of_manifest(manifest):
        raise ContractError(
            f"{config_path} was written for manifest {config.manifest_digest} of model {config.model_digest}, "
            f"{manifest_path} is {manifest.digest} of model {manifest.model.digest}; export the checkpoint again"
        )


def _check_same_declaration(
    quantization: dict[str, Any], manifest: Manifest, config_path: Path, manifest_path: Path
) -> None:
    """A declaration for compressed-tensors follows from the manifest, key by key."""
    expected = compressed_tensors.compressed_tensors_config(manifest.modules)
    for key in sorted(quantization.keys() | expected.keys()):
        if quantization.get(key) != expected.get(key):
            given, wanted = (json.dumps(value)[:200] for value in (quantization.get(key), expected.get(key)))
            raise ContractError(
                f"{config_path}: quantization_config says {key} {given}, by {manifest_path} it is {wanted}; "
                "export the checkpoint again"
            )


def _check_others(folder: Path, stored: dict[str, Any], declared: set[str], manifest: Manifest) -> None:
    quantized = {
        f"{name}.{part}" for name in manifest.modules for part in ("weight", "weight_packed", "weight_zero_point")
    }
    for name in stored.keys() - declared:
        if name in quantized:
            raise ContractError(f"{folder}: {name} contradicts the declared width of its module")
    others = sum(t.nbytes for name, t in stored.items() if name not in declared)
    if others != manifest.other_bytes:
        raise ContractError(
            f"{folder}: the tensors outside the program have {others} bytes, the manifest says {manifest.other_bytes}"
        )


def _words(module: ModuleFormat | None) -> str:
    if module is None:
        return "nothing"
    group = (
        f", group {module.group_size}, {'symmetric' if module.symmetric else 'asymmetric'}" if module.quantized else ""
    )
    return f"{module.num_bits} bits at shape {list(module.shape)}{group}"


DIGESTS_NAME = "gamma_digests.json"

_CHUNK_BYTES = 1 << 22


class TensorDigests(Document):
    """`gamma_digests.json` in a checkpoint: SHA-256 of the bytes of every tensor, by its name."""

    SCHEMA: ClassVar[str] = "gamma.digests"

    manifest_digest: Digest
    tensors: dict[str, Digest] = Field(min_length=1)


def digest_folder(folder: Path, manifest: Manifest) -> TensorDigests:
    """Read every tensor of a checkpoint folder and digest it."""
    tensors = {name: _digest(tensor) for name, tensor in sorted(read_folder_headers(folder).items())}
    return TensorDigests(manifest_digest=manifest.digest, tensors=tensors)


def check_digests(
    folder: Path, manifest: Manifest, told: Callable[[int, int], None] = lambda _done, _total: None
) -> int:
    """Compare every tensor with what was recorded; returns how many there are. `told` is given the bytes that are read
    and those in all after each.

    Raises ContractError naming the first tensor that differs, with both digests.
    """
    path = folder / DIGESTS_NAME
    if not path.exists():
        raise ContractError(f"{path}: no such file; digests are written by `gamma export`, export the checkpoint again")
    recorded = TensorDigests.read(path)
    if recorded.manifest_digest != manifest.digest:
        raise ContractError(
            f"{path} was written for manifest {recorded.manifest_digest}, the checkpoint's is {manifest.digest}; "
            "export it again"
        )
    stored = read_folder_headers(folder)
    if stored.keys() != recorded.tensors.keys():
        odd = sorted(stored.keys() ^ recorded.tensors.keys())[0]
        raise ContractError(f"{folder}: tensor {odd} is in the files or in {DIGESTS_NAME}, but not in both")
    done, total = 0, sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        found = _digest(tensor)
        done += tensor.nbytes
        told(done, total)
        if found != recorded.tensors[name]:
            raise ContractError(
                f"{tensor.path}: tensor {name} is {found}, {DIGESTS_NAME} says {recorded.tensors[name]}; "
                "it was changed or damaged after the export"
            )
    return len(stored)


def _digest(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ContractError(f"{tensor.path}: tensor {tensor.name} is cut short")
            digest.update(chunk)
            left -= len(chunk)
    return "sha256:" + digest.hexdigest()
