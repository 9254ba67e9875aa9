"""The GPU catalogue: what the driver says of each card, as data in `gpus.json` and in files of the user.

`memory_mib` is what `nvidia-smi` shows (NVML's total). CUDA, and so vLLM, sees a little less: what firmware
and driver keep. `cuda_memory_mib` is that number where public logs show it ("total capacity of 23.52 GiB"
in out-of-memory messages; the lowest one seen is taken); otherwise it is estimated, never too high.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from allocator.contract.documents import Strict, explain, parse_json, read_text_limited
from allocator.contract.errors import ContractError, InputError
from allocator.plan.schema import DeviceMemory

__all__ = [
    "Catalogue",
    "Device",
    "Gpu",
    "MigSlice",
    "cuda_memory",
    "device_again",
    "find_gpu",
    "load_catalogue",
    "memory_device",
]

MIB = 1 << 20

_LEAST_CAPABILITY = (7, 5)
_RESERVED_MIB, _RESERVED_PART = 680, 80
"""Memory that CUDA does not see, if unknown: 680 MiB or an eightieth, whichever is more; no card of the table loses
more."""


class MigSlice(Strict):
    """One MIG profile: its Kubernetes resource, its memory as the driver reports it, its part of SMs and memory."""

    profile: str = Field(pattern=r"^[1-7]g\.[0-9]+gb$")
    resource: str
    memory_mib: int = Field(ge=1)
    compute_slices: int = Field(ge=1, le=7)
    memory_eighths: int = Field(ge=1, le=8)


class Gpu(Strict):
    """One card. `product_label` is the value of the node label `nvidia.com/gpu.product`."""

    name: str
    aliases: list[str] = Field(default_factory=list)
    product_label: str
    memory_mib: int = Field(ge=256, le=1 << 22)
    cuda_memory_mib: int | None = Field(default=None, ge=256)
    compute_capability: str = Field(pattern=r"^[0-9]{1,2}\.[0-9]$")
    bandwidth_gb_per_second: float = Field(gt=0)
    segment: Literal["data center", "workstation", "GeForce", "other"] = "other"
    mig: list[MigSlice] = Field(default_factory=list)

    @model_validator(mode="after")
    def _cuda_sees_no_more(self) -> "Gpu":
        if self.cuda_memory_mib is not None and self.cuda_memory_mib > self.memory_mib:
            raise ValueError(f"cuda_memory_mib {self.cuda_memory_mib} is more than memory_mib {self.memory_mib}")
        return self

    @property
    def memory_bytes(self) -> int:
        """As the driver reports it."""
        return self.memory_mib * MIB

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def why_not(self) -> str | None:
        """Why vLLM's kernels do not run on it, or None."""
        if self.capability >= _LEAST_CAPABILITY:
            return None
        return (
            f"{self.name} has compute capability {self.compute_capability}; the kernels of vLLM for 2 to 8 bits need "
            f"{_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} (Turing) or newer"
        )


class Catalogue(Strict):
    """`gpus.json`."""

    SCHEMA: ClassVar[str] = "gamma.gpus"

    schema_name: Literal["gamma.gpus"] = Field(alias="schema")
    schema_version: Literal[1]
    gpus: list[Gpu] = Field(min_length=1)

    @field_validator("gpus")
    @classmethod
    def _names_differ(cls, gpus: list[Gpu]) -> list[Gpu]:
        seen: dict[str, str] = {}
        for gpu in gpus:
            for name in {_plain(n) for n in (gpu.name, gpu.product_label, *gpu.aliases)}:
                if name in seen:
                    raise ValueError(f"{gpu.name} and {seen[name]} have the same name or alias {name}")
                seen[name] = gpu.name
        return gpus

    @classmethod
    def published_schema(cls) -> dict[str, Any]:
        """The JSON Schema of the file."""
        schema = cls.model_json_schema()
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.SCHEMA} | schema


@dataclass(frozen=True)
class Device:
    """What a plan is made for: one GPU, a MIG slice of it, or a bare amount of memory.

    `total_bytes` is what the driver reports, `cuda_bytes` what CUDA and vLLM see; `basis` says where the latter
    is from. `capability` is None where it is not known.
    """

    name: str
    total_bytes: int
    cuda_bytes: int
    basis: Literal["exact", "measured", "formula", "probe"]
    capability: tuple[int, int] | None = None
    bandwidth_gb_per_second: float | None = None
    product_label: str | None = None
    resource: str = "nvidia.com/gpu"
    mig_profile: str | None = None


@cache
def _built_in() -> Catalogue:
    text = files("allocator.plan").joinpath("gpus.json").read_text(encoding="utf-8")
    return Catalogue.model_validate_json(text, strict=True)


def load_catalogue(extra: Path | None = None) -> list[Gpu]:
    """The built-in cards, and those of the file `extra`, which take precedence over cards of the same name.

    Raises ContractError when `extra` is no such file, naming what is wrong in it.
    """
    if extra is None:
        return list(_built_in().gpus)
    text = read_text_limited(extra, 16 << 20)
    parse_json(text, extra)
    try:
        own = Catalogue.model_validate_json(text, strict=True).gpus
    except ValidationError as error:
        raise ContractError(f"{extra}: {explain(error)}; `gamma schema gpus` prints what is allowed") from None
    taken = {_plain(n) for gpu in own for n in (gpu.name, gpu.product_label, *gpu.aliases)}
    kept = [g for g in _built_in().gpus if not taken & {_plain(n) for n in (g.name, g.product_label, *g.aliases)}]
    return [*own, *kept]


def find_gpu(name: str, catalogue: Sequence[Gpu] | None = None) -> Device:
    """The device that `name` means: a name, alias or product label, with `:PROFILE` for a MIG slice (`a100:1g.10gb`).

    Capitals, spaces, dashes and the words NVIDIA, GeForce, Tesla do not count. Raises InputError for an
    unknown name (with the nearest ones), an unknown MIG profile, and a card that cannot run the kernels.
    """
    catalogue = load_catalogue() if catalogue is None else catalogue
    card, _, profile = name.partition(":")
    match = re.fullmatch(r"(.+?)-MIG-([1-7]g\.[0-9]+gb)", card)
    if match and not profile:  # the product label of a node whose GPUs are all cut the same way
        card, profile = match[1], match[2]
    names = {_plain(n): gpu for gpu in catalogue for n in (gpu.name, gpu.product_label, *gpu.aliases)}
    gpu = names.get(_plain(card))
    if gpu is None:
        near = difflib.get_close_matches(_plain(card), list(names), n=5, cutoff=0.5)
        nearest = list(dict.fromkeys((names[n].aliases or [names[n].name])[0] for n in near))
        hint = (
            f"nearest are {', '.join(nearest)}" if nearest else "`gamma plan MODEL` without --gpu lists the known ones"
        )
        raise InputError(f"GPU {name[:60]!r} is not known; {hint}; or give --gpu-memory 24GiB")
    if gpu.why_not is not None:
        raise InputError(gpu.why_not)
    return _whole(gpu) if not profile else _slice(gpu, profile)


def memory_device(total_bytes: int) -> Device:
    """A device of which only the memory is known, as a data sheet or the driver says it: CUDA sees less."""
    return Device(f"{total_bytes / 2**30:.2f} GiB", total_bytes, _cuda_bytes(total_bytes), "formula")


def device_again(memory: DeviceMemory) -> Device:
    """The device that a plan was made for."""
    capability = None
    if memory.compute_capability is not None:
        major, minor = memory.compute_capability.split(".")
        capability = int(major), int(minor)
    return Device(
        name=memory.name,
        total_bytes=memory.total_bytes,
        cuda_bytes=memory.cuda_bytes,
        basis=memory.basis,
        capability=capability,
        product_label=memory.product_label,
        resource=memory.resource,
    )


def cuda_memory(total_mib: int) -> int:
    """Bytes that CUDA sees of a card whose driver reports `total_mib`, estimated from below."""
    return _cuda_bytes(total_mib * MIB)


def _cuda_bytes(total_bytes: int) -> int:
    return max(total_bytes - max(_RESERVED_MIB * MIB, total_bytes // _RESERVED_PART), total_bytes // 2)


def _whole(gpu: Gpu) -> Device:
    known = gpu.cuda_memory_mib
    return Device(
        name=gpu.name,
        total_bytes=gpu.memory_bytes,
        cuda_bytes=cuda_memory(gpu.memory_mib) if known is None else known * MIB,
        basis="formula" if known is None else "measured",
        capability=gpu.capability,
        bandwidth_gb_per_second=gpu.bandwidth_gb_per_second,
        product_label=gpu.product_label,
    )


def _slice(gpu: Gpu, profile: str) -> Device:
    found = next((s for s in gpu.mig if s.profile == profile), None)
    if found is None:
        known = ", ".join(s.profile for s in gpu.mig) or "none"
        raise InputError(f"{gpu.name} has no MIG profile {profile[:20]!r}; it has {known}")
    return Device(
        name=f"{gpu.name} MIG {profile}",
        total_bytes=found.memory_mib * MIB,
        cuda_bytes=found.memory_mib * MIB,
        basis="measured",
        capability=gpu.capability,
        bandwidth_gb_per_second=gpu.bandwidth_gb_per_second * found.memory_eighths / 8,
        product_label=f"{gpu.product_label}-MIG-{profile}",
        resource=found.resource,
        mig_profile=profile,
    )


def _plain(name: str) -> str:
    words = re.split(r"[\s_-]+", name.strip().lower())
    return "".join(w for w in words if w not in ("nvidia", "geforce", "tesla", "quadro", "generation"))
