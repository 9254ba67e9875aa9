"""The tables of every verb's results: plain data in, rich renderables out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from allocator.contract.amounts import format_bytes
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.manifest import Manifest, average_bits
from allocator.contract.scores import Scores
from allocator.model import Inventory, Module, side_files
from allocator.report.grid import grid_of, kind_of, local_name, short_kind, short_name

if TYPE_CHECKING:
    from allocator.export import ExportReport

__all__ = [
    "block_bits",
    "bytes_table",
    "export_table",
    "inventory_table",
    "joined_rows",
    "manifest_tables",
    "manifest_title",
    "new_table",
    "scores_table",
    "width_text",
    "widths_table",
]

_STYLES = {2: "bold red", 3: "red", 4: "yellow", 5: "green", 6: "cyan", 8: "blue", 16: "bold magenta"}


def width_text(num_bits: int) -> Text:
    """A width as its number, coloured."""
    return Text(str(num_bits), style=_STYLES.get(num_bits, ""))


def inventory_table(inventory: Inventory, widths: Iterable[int], group_size: int, symmetric: bool) -> RenderableType:
    """What is in a model: one row a kind of module, its bytes at every width, and the feasible range of budgets.

    Bytes are of all modules of the row together; a dash stands where a row has no such width.
    """
    columns = sorted({*widths, 16})
    unit, divisor = ("MiB", 2**20) if sum(m.parameters for m in inventory.modules) > 2**21 else ("KiB", 2**10)
    table = new_table(f"{inventory.architecture}, {inventory.blocks} blocks, {inventory.dtype}; {unit} at each width")
    table.add_column("module", overflow="fold")
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("out x in", justify="right", no_wrap=True)
    for bits in columns:
        table.add_column(f"{bits}b", justify="right", style=_STYLES.get(bits, ""), no_wrap=True)
    notes: dict[str, int] = {}
    for (name, shape), modules in _kinds(inventory.modules).items():
        sizes: dict[int, int] = {}
        for module in modules:
            for form in inventory.formats(module, columns, group_size, symmetric):
                sizes[form.num_bits] = sizes.get(form.num_bits, 0) + module_bytes(form)
            if module.why_16 is not None:
                note = f"{short_name(name)}: {module.why_16}"
                notes[note] = notes.get(note, 0) + 1
        cells = [_number(sizes[bits] / divisor) if bits in sizes else "-" for bits in columns]
        table.add_row(short_name(name), str(len(modules)), f"{shape[0]}x{shape[1]}", *cells)
    others = [*["-"] * (len(columns) - 1), _number(inventory.other_bytes / divisor)]
    table.add_row("(copied)", str(len(inventory.others)), "", *others)
    return Group(table, *_inventory_lines(inventory, notes, columns, group_size, symmetric))


def widths_table(modules: Mapping[str, ModuleFormat], title: str = "width of each module") -> Table:
    """Widths of an assignment: blocks down, modules across. Neighbouring blocks with equal widths share a row.

    The experts of a layer share a column, which shows their mean width.
    """
    grid = grid_of({name: form.num_bits for name, form in modules.items()})
    table = new_table(title)
    table.add_column("block", justify="right", no_wrap=True)
    for kind in grid.kinds:
        table.add_column(short_kind(kind), justify="right", no_wrap=True)
    rows = [(block, tuple(_cell(row.get(kind)) for kind in grid.kinds)) for block, row in grid.cells.items()]
    for label, cells in joined_rows(rows):
        table.add_row(label, *cells)
    if grid.outside:
        parts = [Text.assemble(f"{name} ", width_text(bits)) for name, bits in grid.outside.items()]
        table.caption = Text(", ").join(parts)
    return table


def joined_rows(rows: Iterable[tuple[int, tuple[Text, ...]]]) -> list[tuple[str, tuple[Text, ...]]]:
    """Rows by block number; neighbours that read the same become one, labelled `3-7`."""
    joined = []
    for cells, run in groupby(rows, key=lambda row: row[1]):
        numbers = [number for number, _ in run]
        joined.append((str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", cells))
    return joined


def bytes_table(rows: Sequence[tuple[str, int, int | None]], title: str = "bytes") -> Table:
    """Rows of (what, predicted bytes, written bytes or None when nothing is written yet), differences shown."""
    written = any(measured is not None for _, _, measured in rows)
    table = new_table(title)
    table.add_column("")
    table.add_column("predicted", justify="right", no_wrap=True)
    if written:
        table.add_column("written", justify="right", no_wrap=True)
        table.add_column("difference", justify="right", no_wrap=True)
    for what, predicted, measured in rows:
        cells: list[str | Text] = [what, f"{predicted:,}"]
        if written:
            difference = None if measured is None else measured - predicted
            cells.append("" if measured is None else f"{measured:,}")
            shown = "" if difference is None else f"{difference:+,}" if difference else "0"
            cells.append(Text(shown, style="bold red" if difference else ""))
        table.add_row(*cells)
    return table


def new_table(title: str) -> Table:
    """An empty table in the style of all of them."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=False)


def _kinds(modules: Iterable[Module]) -> dict[tuple[str, tuple[int, int]], list[Module]]:
    """Modules of one local name and shape together, in model order."""
    kinds: dict[tuple[str, tuple[int, int]], list[Module]] = {}
    for module in modules:
        kinds.setdefault((kind_of(local_name(module.name)), module.shape), []).append(module)
    return kinds


def _inventory_lines(
    inventory: Inventory, notes: Mapping[str, int], widths: Sequence[int], group_size: int, symmetric: bool
) -> list[Text]:
    fused: dict[str, list[str]] = {}
    for group, members in inventory.fused_groups.items():
        fused.setdefault(local_name(group), list(dict.fromkeys(short_name(local_name(m)) for m in members)))
    smallest, largest = inventory.feasible_bytes(widths, group_size, symmetric)
    lines = ["fused in vLLM: " + "; ".join(f"{name} = {', '.join(ms)}" for name, ms in fused.items())]
    lines += [f"16 bits only: {note} ({count})" for note, count in notes.items()]
    if inventory.dropped:
        lines.append(f"tied, stored twice, left out: {', '.join(t.name for t in inventory.dropped)}")
    lines += [*inventory.told(), *side_files(inventory).told()]
    lines.append(f"group size {group_size}, {'symmetric' if symmetric else 'asymmetric'}")
    lines.append(f"feasible budgets: {smallest:,} to {largest:,} bytes")
    unit, divisor = ("GiB", 2**30) if smallest >= 2**30 else ("MiB", 2**20)
    lines.append(f"                  {smallest / divisor:.3f} to {largest / divisor:.3f} {unit}")
    return [Text(line) for line in lines]


def _cell(widths: Sequence[int] | None) -> Text:
    if not widths:
        return Text("-")
    if len(set(widths)) == 1:
        return width_text(widths[0])
    mean = sum(widths) / len(widths)
    return Text(f"{mean:.1f}", style=_STYLES.get(min(_STYLES, key=lambda bits: abs(bits - mean)), ""))


def _number(value: float) -> str:
    """At most six characters, so that seven widths fit 80 columns."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


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
        *_predicting_rows(manifest),
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
    if manifest.tuning is not None:
        t = manifest.tuning
        rows.append(("tuned", f"KL {t.kl_before:.5f} -> {t.kl:.5f}: {t.kept} kept"))
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


def _predicting_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What a server holds only if it is told to speculate."""
    nbytes = manifest.predicting_bytes
    return (
        [] if nbytes is None else [("of these", f"{nbytes:,} bytes of layers that predict further tokens, at 16 bits")]
    )


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
