"""`prepared.json`: what `gamma prepare` wrote into a folder, for those who serve and watch it."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from allocator.contract.documents import Digest, Strict, explain
from allocator.contract.errors import ContractError

__all__ = ["PREPARED_NAME", "Prepared", "read_prepared"]

PREPARED_NAME = "prepared.json"


class Prepared(Strict):
    """What lies in the folder, and why it was chosen. `unchanged`: it had been there already."""

    request_digest: Digest
    checkpoint: str
    manifest_digest: Digest
    tensor_bytes: int
    vllm_arguments: dict[str, Any]
    reason: str
    unchanged: bool = False


def read_prepared(folder: Path) -> Prepared:
    """Raises OSError where the file is not, ContractError where it is no such file."""
    path = folder / PREPARED_NAME
    try:
        return Prepared.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ContractError(f"{path}: {explain(error)}") from None
