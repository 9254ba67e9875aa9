"""What changed between two manifests of one model: module by module, in bytes, and in predicted loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.manifest import MANIFEST_NAME, Manifest
from allocator.contract.scores import Scores
from allocator.report.grid import grid_of, short_kind
from allocator.report.tables import block_bits, joined_rows, new_table
from allocator.solve.predicted import predicted_loss, single_losses
from allocator.solve.request import average_bits_of

__all__ = [
    "COLUMNS",
    "Change",
    "Comparison",
    "compare",
    "comparison_document",
    "comparison_tables",
    "read_manifest",
    "row_of",
]


COLUMNS = (
    "module", "bits_before", "bits_after", "group_size_before", "group_size_after",
    "bytes_before", "bytes_after", "bytes_change", "loss_before", "loss_after", "loss_change",
)  # fmt: skip
"""Of `row_of`: what CSV has for a change."""


@dataclass(frozen=True)
class Change:
    """One module that is stored differently. `loss` is what its width is predicted to cost, where scores are known."""

    module: str
    before: ModuleFormat
    after: ModuleFormat
    bytes_before: int
    bytes_after: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Comparison:
    """Two manifests of one model, the modules in which they differ, and both predicted losses (None: not known)."""

    before: Manifest
    after: Manifest
    changes: list[Change]
    loss_before: float | None
    loss_after: float | None
    scores: Scores | None = None

    @property
    def unit(self) -> str | None:
        return None if self.scores is None else self.scores.unit

    @property
    def loss_change(self) -> float | None:
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`, or inside the checkpoint folder `path`."""
    return Manifest.read(path / MANIFEST_NAME if path.is_dir() else path)


def compare(before: Manifest, after: Manifest, scores: Scores | None = None) -> Comparison:
    """What `after` has otherwise than `before`.

    With `scores` every loss is looked up in them, the totals with what modules do together; without, the totals are
    those that the manifests record, and are compared only if both were solved from the same scores. Raises
    ContractError when the manifests, or the scores, are not of one model.
    """
    _same_model(before, after)
    _same_modules(before, after)
    if scores is not None and scores.model.digest != before.model.digest:
        raise ContractError(
            f"the scores are of model {scores.model.name} ({scores.model.digest}), "
            f"the manifests of {before.model.name} ({before.model.digest}); give the scores of that model"
        )
    losses = [None if scores is None else single_losses(scores, m.modules) for m in (before, after)]
    changes = []
    for name, old in before.modules.items():
        new = after.modules[name]
        if old != new:
            costs = [None if of is None else of[name] for of in losses]
            sizes = before.module_bytes[name], after.module_bytes[name]
            changes.append(Change(name, old, new, *sizes, *costs))
    known = before.scores_digest is not None and before.scores_digest == after.scores_digest
    totals = [
        predicted_loss(scores, m.modules)
        if scores is not None
        else (m.proof.objective if known and m.proof is not None else None)
        for m in (before, after)
    ]
    return Comparison(before, after, changes, totals[0], totals[1], scores)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """All of a comparison as plain data."""
    return {
        "model": comparison.before.model.model_dump(mode="json"),
        "before": _side(comparison.before, comparison.loss_before, comparison.scores),
        "after": _side(comparison.after, comparison.loss_after, comparison.scores),
        "tensor_bytes_change": comparison.after.tensor_bytes - comparison.before.tensor_bytes,
        "predicted_loss_change": comparison.loss_change,
        "unit": comparison.unit,
        "modules": len(comparison.before.modules),
        "changed": [row_of(change) for change in comparison.changes],
    }


def row_of(change: Change) -> dict[str, Any]:
    """One change as a row of a table: every value a number, a text or None."""
    values = (
        change.module, change.before.num_bits, change.after.num_bits, change.before.group_size, change.after.group_size,
        change.bytes_before, change.bytes_after, change.bytes_after - change.bytes_before,
        change.loss_before, change.loss_after, _difference(change.loss_before, change.loss_after),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def comparison_tables(comparison: Comparison) -> list[RenderableType]:
    """Totals of both, and a grid of the blocks with `3>4` where a width changed."""
    if not comparison.changes:
        return [_totals(comparison), "no module differs"]
    return [_changes(comparison), _totals(comparison)]


def _changes(comparison: Comparison) -> Table:
    before, after = (
        grid_of({name: form.num_bits for name, form in m.modules.items()})
        for m in (comparison.before, comparison.after)
    )
    table = new_table("width before > after, . as it was")
    table.add_column("block", justify="right", no_wrap=True)
    for kind in before.kinds:
        table.add_column(short_kind(kind), justify="right", no_wrap=True)
    rows = [
        (block, tuple(_step(row.get(kind), after.cells[block].get(kind)) for kind in before.kinds))
        for block, row in before.cells.items()
    ]
    for label, cells in joined_rows(rows):
        table.add_row(label, *cells)
    outside = [
        Text.assemble(f"{name} ", _step([bits], [after.outside[name]]))
        for name, bits in before.outside.items()
        if bits != after.outside[name]
    ]
    if outside:
        table.caption = Text(", ").join(outside)
    return table


def _step(old: list[int] | None, new: list[int] | None) -> Text:
    if not old or not new:
        return Text("-")
    if old == new:
        return Text(".", style="dim")
    style = "green" if sum(new) > sum(old) else "red" if sum(new) < sum(old) else "yellow"
    return Text(f"{_mean(old)}>{_mean(new)}", style=style)


def _mean(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{sum(values) / len(values):.1f}"


def _totals(comparison: Comparison) -> Table:
    old, new = comparison.before, comparison.after
    table = new_table(f"{old.model.name}, {old.model.architecture}")
    for head in ("", "before", "after", "change"):
        table.add_column(head, justify="right" if head else "left", overflow="fold")
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("budget, bytes", old.budget.nbytes, new.budget.nbytes, ","),
        ("bytes of all tensors", old.tensor_bytes, new.tensor_bytes, ","),
        ("average bits of the blocks", block_bits(old), block_bits(new), ".3f"),
        ("predicted loss", comparison.loss_before, comparison.loss_after, ".5g"),
    ]
    for what, a, b, form in rows:
        change = _difference(a, b)
        shown = ["not known" if x is None else f"{x:{form}}" for x in (a, b)]
        table.add_row(what, *shown, "" if change is None else f"{change:+{form}}")
    table.add_row("modules that differ", "", f"{len(comparison.changes)} of {len(old.modules)}", "")
    if comparison.unit is not None:
        table.caption = Text(f"loss: {comparison.unit}")
    elif comparison.loss_change is None:
        table.caption = Text("predicted losses of different scores do not compare: give --scores")
    return table


def _side(manifest: Manifest, loss: float | None, scores: Scores | None) -> dict[str, Any]:
    return {
        "digest": manifest.digest,
        "requested": manifest.budget.requested,
        "budget_bytes": manifest.budget.nbytes,
        "tensor_bytes": manifest.tensor_bytes,
        "average_bits": None if scores is None else average_bits_of(scores, manifest.tensor_bytes),
        "block_bits": block_bits(manifest),
        "predicted_loss": loss,
        "method": manifest.method,
    }


def _same_model(before: Manifest, after: Manifest) -> None:
    if before.model.digest != after.model.digest:
        raise ContractError(
            f"the manifests are of different models: {before.model.name} ({before.model.digest}) and "
            f"{after.model.name} ({after.model.digest}); compare manifests of one model"
        )


def _same_modules(before: Manifest, after: Manifest) -> None:
    if before.parents.layout != after.parents.layout:
        raise ContractError(
            f"the manifests are of {before.parents.granularity} and of {after.parents.granularity}; "
            "compare manifests of one granularity"
        )
    odd = sorted(before.modules.keys() ^ after.modules.keys())
    if odd:
        raise ContractError(
            f"{odd[0]}: is a module of only one of the manifests ({before.digest}, {after.digest}), "
            "which were made by different releases; solve both again"
        )


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
