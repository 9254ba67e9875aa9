"""Losses that manifests carry because they were measured: `gamma solve --verify`, `gamma refine`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import RenderableType
from rich.text import Text

from allocator.contract.errors import ContractError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.report.tables import new_table
from allocator.solve.predicted import predicted_loss
from allocator.solve.request import average_bits_of

__all__ = ["RECORDED_UNIT", "Recorded", "check_scores", "recorded_loss", "recorded_row", "recorded_table"]

RECORDED_UNIT = "nats of KL divergence from the original a token, on the text that is named"


@dataclass(frozen=True)
class Recorded:
    """One assignment whose KL divergence from the original (nats a token) was measured on `tokens` tokens of a text.

    `record` says by what: "refinement" chose the assignment on that same text, so its figure is the kinder one. Where
    the best uniform plan of its bytes was measured beside it, `uniform_loss` and `uniform_bits` are that.
    """

    manifest_digest: str
    tensor_bytes: int
    average_bits: float
    predicted_loss: float
    measured_loss: float
    record: Literal["verification", "refinement"]
    tokens: int
    text_digest: str
    uniform_loss: float | None = None
    uniform_bits: int | None = None


def check_scores(manifest: Manifest, scores: Scores) -> None:
    """Raises ContractError unless `manifest` was solved from `scores`."""
    if manifest.scores_digest != scores.digest:
        raise ContractError(
            f"manifest {manifest.digest} was solved from scores {manifest.scores_digest or '(not recorded)'}, "
            f"given are {scores.digest}; give a manifest of these scores"
        )


def recorded_loss(manifest: Manifest, scores: Scores) -> Recorded | None:
    """What `manifest` says of its own assignment, None if nothing was measured. Raises ContractError for other scores.

    A refinement that changed something comes after a verification, which was then of another assignment.
    """
    check_scores(manifest, scores)
    verified, refined = manifest.verification, manifest.refinement
    fell_back = verified is not None and verified.kept == "uniform" and manifest.method == "uniform"
    if refined is not None and (verified is None or refined.kept) and not fell_back:
        found: dict[str, Any] = {"record": "refinement", "measured_loss": refined.kl}
        text = refined.text_digest, refined.tokens
    elif verified is not None:
        loss = verified.uniform_kl if verified.kept == "uniform" else verified.kl
        found = {
            "record": "verification", "measured_loss": loss,
            "uniform_loss": verified.uniform_kl, "uniform_bits": verified.uniform_bits,
        }  # fmt: skip
        text = verified.text_digest, verified.tokens
    else:
        return None
    return Recorded(
        manifest_digest=manifest.digest,
        tensor_bytes=manifest.tensor_bytes,
        average_bits=average_bits_of(scores, manifest.tensor_bytes),
        predicted_loss=predicted_loss(scores, manifest.modules),
        text_digest=text[0],
        tokens=text[1],
        **found,
    )


def recorded_row(recorded: Recorded) -> dict[str, Any]:
    """As plain data."""
    return {name: value for name, value in vars(recorded).items() if value is not None}


def recorded_table(found: Sequence[Recorded]) -> list[RenderableType]:
    """One row an assignment, the smallest first; nothing if there is none."""
    if not found:
        return []
    unit, divisor = ("GiB", 2**30) if max(r.tensor_bytes for r in found) >= 0.1 * 2**30 else ("MiB", 2**20)
    table = new_table("measured before, as their manifests say")
    for head in ("manifest", unit, "bits", "predicted", "measured", "uniform", "tokens", "of text"):
        table.add_column(head, justify="left" if head in ("manifest", "of text") else "right", no_wrap=True)
    for r in sorted(found, key=lambda r: r.tensor_bytes):
        uniform = "-" if r.uniform_loss is None else f"{r.uniform_loss:.3g} at {r.uniform_bits}"
        table.add_row(
            r.manifest_digest[7:15], f"{r.tensor_bytes / divisor:.3f}", f"{r.average_bits:.3f}",
            f"{r.predicted_loss:.3g}", f"{r.measured_loss:.3g}" + ("*" if r.record == "refinement" else ""), uniform,
            f"{r.tokens:,}", r.text_digest[7:15],
        )  # fmt: skip
    notes = [Text(f"measured: {RECORDED_UNIT}")]
    if any(r.record == "refinement" for r in found):
        notes.append(Text("* on the text that the assignment was refined on, which is kind to it"))
    return [table, *notes]
