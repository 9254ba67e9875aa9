"""What a run depends on, written into its work folder, so that a later one knows what of it can be used again."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from allocator.contract.bank import ModelReference
from allocator.contract.documents import Document

__all__ = ["RUN_NAME", "RunFingerprint", "versions"]

RUN_NAME = "run.json"
_PACKAGES = ("gamma-vllm", "torch", "transformers")


class RunFingerprint(Document):
    """`run.json`. The sections in the order of the data flow: what differs in one undoes all that comes after it.

    environment: versions, device, threads. It changes results in the last digits only: work that is kept across such
    a change is whole, but not equal to the bit to a run in one environment.
    """

    SCHEMA: ClassVar[str] = "gamma.run"

    model: ModelReference
    calibration: dict[str, Any]
    candidates: dict[str, Any]
    learning: dict[str, Any]
    environment: dict[str, Any]

    def differences(self, now: "RunFingerprint") -> dict[str, str]:
        """Field -> "was ..., is ..." for each field in which `now` is another."""
        before, after = _flat(self.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
        return {
            field: f"was {before.get(field, 'absent')}, is {after.get(field, 'absent')}"
            for field in sorted(before.keys() | after.keys())
            if before.get(field, "absent") != after.get(field, "absent")
        }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
