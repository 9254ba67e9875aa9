"""Reads Dockerfiles: instructions with their stage."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEPLOY", "DOCKERFILES", "Instruction", "read"]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = {path.name.removesuffix(".Dockerfile"): path for path in sorted(DEPLOY.glob("*.Dockerfile"))}


@dataclass(frozen=True)
class Instruction:
    stage: int
    word: str
    text: str


def read(path: Path) -> list[Instruction]:
    """Comments are dropped, continued lines joined. Instructions before the first FROM are of stage -1."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found, stage = [], -1
    for line in joined.splitlines():
        word, _, text = line.partition(" ")
        stage += word == "FROM"
        found.append(Instruction(stage, word, text.strip()))
    return found
