"""The comparison as pictures: KL by bits, and how much more or less than a reference each method loses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from allocator.report.figures import new_figure, save_figure

__all__ = ["draw_judged", "draw_settings"]

LOOK: dict[str, tuple[str, str, str]] = {
    "uniform": ("#888888", "s", ":"),
    "head and tail": ("#888888", "v", "--"),
    "deltaloss": ("#b07aa1", "D", "-"),
    "AutoScheme": ("#b07aa1", "P", "--"),
    "fisher": ("#f28e2b", "^", "-"),
    "block error x KL weight": ("#9c755f", ">", "-"),
    "measured": ("#333333", "o", "-"),
    "relaxed": ("#59a14f", "X", "-"),
    "evolutionary search": ("#4e79a7", "*", "none"),
    "gradient search": ("#76b7b2", "d", "none"),
    "gamma": ("#e15759", "o", "-"),
    "gamma refined": ("#e15759", "<", "--"),
}
"""Colour, marker and line by method, in the order of the legend; rows of other methods are in the tables alone."""
NEAR = (0.92, 1.25)
"""Ratios that the pictures show; what lies beyond is cut off."""

Row = dict[str, Any]


def draw_judged(rows: Sequence[Row], path: Path) -> None:
    """Left: KL by bits, all methods. Right: the same by the KL of `measured`, with 95 % intervals."""
    figure = new_figure(10.5, 4.6)
    left, right = figure.subplots(1, 2)
    _lines(left, rows, "kl")
    left.set(title="KL on held-out books, nats a token", xlabel="average bits, scales and zero points included")
    left.set_yscale("log")
    _lines(right, rows, "by_measured", bars=True)
    right.axhline(1.0, color="#333333", linewidth=0.8)
    right.set(title="the same, by that of measured swaps (bars: 95 %)", xlabel="average bits", ylim=NEAR)
    for axes in (left, right):
        axes.set_xticks(next(r["bits"] for r in rows if r["method"] == "measured"))
        axes.tick_params(axis="x", labelrotation=45)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(figure, path)


def draw_settings(rows: Sequence[Row], settings: Sequence[str], path: Path) -> None:
    """One panel a setting: KL by that of gamma."""
    present = [s for s in settings if any((r["setting"], r["method"]) == (s, "gamma") for r in rows)]
    columns = min(4, len(present))
    figure = new_figure(2.6 * columns + 1.5, 2.5 * -(-len(present) // columns))
    panels = figure.subplots(-(-len(present) // columns), columns, squeeze=False, sharey=True).ravel()
    for panel, setting in zip(panels, present, strict=False):
        _lines(panel, [r for r in rows if r["setting"] == setting], "by_gamma")
        panel.axhline(1.0, color="#e15759", linewidth=0.8)
        panel.set(title=setting, ylim=NEAR)
    for panel in panels[len(present) :]:
        panel.set_axis_off()
    figure.supxlabel("average bits", fontsize=9)
    figure.supylabel("KL on held-out text by that of gamma", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """In 256 colours, which lines and text do not miss, at a third of the bytes."""
    save_figure(figure, [path])
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def _lines(axes: Any, rows: Sequence[Row], what: str, bars: bool = False) -> None:
    """One line a method; with `bars` its intervals too, methods set side by side a little."""
    for place, (name, (colour, marker, line)) in enumerate(LOOK.items()):
        row = next(
            (r for r in rows if r["method"] == name or (name == "AutoScheme" and r["method"].startswith(name))), None
        )
        found = [] if row is None else [(b, v) for b, v in zip(row["bits"], row["books"][what], strict=True) if v]
        if row is None or not found:
            continue
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.1}
        x, y = [b for b, _ in found], [v if isinstance(v, float) else v[0] for _, v in found]
        if not bars:
            axes.plot(x, y, label=row["method"], **look)
            continue
        shift = (place - len(LOOK) / 2) * 0.008
        ends = [[v - low for _, (v, low, _) in found], [high - v for _, (v, _, high) in found]]
        axes.errorbar([b + shift for b in x], y, yerr=ends, label=row["method"], elinewidth=0.7, **look)
