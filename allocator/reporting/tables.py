"""The tables of `gamma inspect`, `gamma solve` and `gamma export`: plain data in, rich renderables out.

Every table fits 80 columns, and says by text what it says by colour.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.inventory import Inventory, Module, side_files
from allocator.reporting.grid import grid_of, kind_of, local_name, short_kind, short_name

__all__ = ["bytes_table", "inventory_table", "joined_rows", "new_table", "width_text", "widths_table"]

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
