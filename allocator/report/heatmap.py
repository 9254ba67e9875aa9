"""The heat map of an assignment: blocks across, kinds of modules down, one cell a width."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from allocator.contract.layout import WIDTHS, ModuleFormat
from allocator.report.figures import new_figure
from allocator.report.grid import Grid, grid_of, short_kind

__all__ = ["draw_heatmap"]

_MOST_NUMBERED_BLOCKS = 72
"""With more blocks than this the cells are too narrow for a number."""


def draw_heatmap(panels: Mapping[str, Mapping[str, ModuleFormat]]) -> Any:
    """A figure of the width of every module: one panel an assignment, by title.

    Colours run from dark (few bits) to light, so that grey prints tell the same; numbers stand in the cells where they
    fit. A cell of experts shows their mean width, and what stands in no block (lm_head, embeddings) is named below.
    """
    grids = [grid_of({name: form.num_bits for name, form in modules.items()}) for modules in panels.values()]
    blocks = max(len(grid.cells) for grid in grids)
    cell = min(0.32, 15.0 / max(blocks, 1))
    height = sum(1.0 + 0.3 * max(len(grid.kinds), 3) for grid in grids)
    figure = new_figure(max(5.5, 1.6 + cell * blocks), height)
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(_shades(len(WIDTHS)))
    # A mean of experts takes the colour of the nearest width.
    edges = [WIDTHS[0] - 1.0, *((a + b) / 2 for a, b in pairwise(WIDTHS)), WIDTHS[-1] + 1.0]
    norm = BoundaryNorm(edges, colours.N)
    all_axes = figure.subplots(len(grids), squeeze=False)[:, 0]
    for axes, title, grid in zip(all_axes, panels, grids, strict=True):
        _draw_panel(axes, grid, title, colours, norm)
    image = all_axes[0].images[0]
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    bar = figure.colorbar(image, ax=list(all_axes), ticks=centres, spacing="uniform", pad=0.01, fraction=0.05)
    bar.ax.set_yticklabels([str(bits) for bits in WIDTHS])
    bar.ax.tick_params(which="both", length=0)
    bar.set_label("bits of a weight's code")
    bar.outline.set_visible(False)
    return figure


def _draw_panel(axes: Any, grid: Grid, title: str, colours: Any, norm: Any) -> None:
    blocks, kinds = list(grid.cells), grid.kinds
    values = [[_or_nan(grid.mean(block, kind)) for block in blocks] for kind in kinds]
    axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    _label_cells(axes, grid, values, norm)
    axes.set_title(title)
    axes.set_yticks(range(len(kinds)), [short_kind(kind) for kind in kinds])
    step = 1 if len(blocks) <= 40 else 4 if len(blocks) <= 100 else 10
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_xlabel("block" + _outside(grid))
    axes.spines[:].set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(blocks))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(kinds))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)


def _shades(count: int) -> list[Any]:
    """Colours whose lightness rises evenly."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.02 + 0.98 * i / (count - 1))) for i in range(count)]


def _label_cells(axes: Any, grid: Grid, values: list[list[float]], norm: Any) -> None:
    if len(grid.cells) > _MOST_NUMBERED_BLOCKS:
        return
    size = 7 if len(grid.cells) <= 48 else 5.5
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                text = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
                light = norm(value) >= len(WIDTHS) - 3
                axes.text(x, y, text, ha="center", va="center", fontsize=size, color="black" if light else "white")


def _outside(grid: Grid) -> str:
    named = ", ".join(f"{name} {bits}" for name, bits in grid.outside.items())
    return f"   (outside the blocks: {named})" if named else ""


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
