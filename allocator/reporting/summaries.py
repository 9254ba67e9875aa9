"""The tables of whole results: scores, a manifest, an export."""

import re
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from allocator.contract.amounts import format_bytes
from allocator.contract.manifest import Manifest, average_bits
from allocator.contract.scores import Scores
from allocator.reporting.grid import kind_of, local_name, short_kind
from allocator.reporting.tables import bytes_table, new_table, widths_table

if TYPE_CHECKING:  # brings torch
    from allocator.exporting import ExportReport

__all__ = ["block_bits", "export_table", "manifest_tables", "manifest_title", "scores_table"]


def scores_table(scores: Scores) -> RenderableType:
    """What each width costs, summed over the modules of each kind; and the feasible range of budgets."""
    kinds: dict[str, dict[int, float]] = {}
    for name, module in scores.modules.items():
        if len(module.candidates) > 1:
            sums = kinds.setdefault(short_kind(kind_of(local_name(name))), {})
            for c in module.candidates:
                sums[c.format.num_bits] = sums.get(c.format.num_bits, 0.0) + c.score
    widths = sorted({b for sums in kinds.values() for b in sums})
    table = new_table("learned cost of each width, summed over all blocks")
    table.add_column("module")
    for bits in widths:
        table.add_column(f"{bits}b", justify="right", no_wrap=True)
    for kind, sums in kinds.items():
        table.add_row(kind, *(f"{sums[b]:.1e}" if b in sums else "-" for b in widths))
    low, high = scores.feasible_bytes()
    return Group(table, f"cost: {scores.unit}", f"feasible budgets: {low:,} to {high:,} bytes")


def manifest_tables(manifest: Manifest) -> list[RenderableType]:
    """The width of every module, and what the assignment is worth in bytes."""
    table = new_table("assignment")
    table.add_column("")
    table.add_column("", overflow="fold")
    rows = [
        ("budget", f"{manifest.budget.requested} = {manifest.budget.nbytes:,} bytes"),
        ("all tensors", f"{manifest.tensor_bytes:,} bytes ({manifest.tensor_bytes / 2**30:.4f} GiB)"),
        *_resident_rows(manifest),
        ("left over", f"{manifest.budget.nbytes - manifest.budget.used(manifest.tensor_bytes):,} bytes"),
        ("average width", f"{block_bits(manifest):.3f} bits, scales and zero points included,"),
        ("", "over the linear modules of all blocks"),
    ]
    if manifest.proof is not None:
        proof = manifest.proof
        rows.append(("proof", f"{proof.solver}: sum of scores {proof.objective:.6g}, gap {proof.gap:.2g}"))
    if manifest.verification is not None:
        v = manifest.verification
        beside = f", vocabulary {v.uniform_vocabulary_bits}" if v.uniform_vocabulary_bits else ""
        uniform = f"uniform {v.uniform_bits} bits{beside}"
        rows.append(("verified", f"KL {v.kl:.5f}, {uniform} {v.uniform_kl:.5f}: {v.kept} kept"))
    if manifest.refinement is not None:
        r = manifest.refinement
        rows.append(("refined", f"KL {r.kl_before:.5f} -> {r.kl:.5f}, {r.kept} of {r.tried} changes kept"))
    rows.append(("digest", manifest.digest))
    for what, value in rows:
        table.add_row(what, value)
    return [widths_table(manifest.modules), table]


def block_bits(manifest: Manifest) -> float:
    """Average stored bits a weight over the linear modules of all blocks, scales and zero points included."""
    return average_bits(manifest.modules, {name for name in manifest.modules if re.search(r"\.\d+\.", name)})


def manifest_title(manifest: Manifest) -> str:
    """One line for a figure: model, size, average width in the blocks."""
    size = format_bytes(manifest.tensor_bytes).partition(" (")[0]
    return f"{manifest.model.name}, {size}, {block_bits(manifest):.2f} bits on average in the blocks"


def _resident_rows(manifest: Manifest) -> list[tuple[str, str]]:
    held = manifest.budget.resident_bytes
    if held is None:
        return []
    return [("on a rank", f"{held:,} bytes ({held / 2**30:.4f} GiB) of weights after loading; the budget is of these")]


def export_table(report: "ExportReport") -> RenderableType:
    """Predicted and written bytes, file by file; and which files of the model's folder did not come along."""
    rows: list[tuple[str, int, int | None]] = [
        (name, predicted, report.written[name]) for name, predicted in report.predicted.items()
    ]
    if len(rows) > 1:
        rows.append(("all files", sum(report.predicted.values()), sum(report.written.values())))
    table = bytes_table(rows, f"bytes of {report.folder}, headers included")
    return Group(table, *map(Text, report.side_files.told()))
