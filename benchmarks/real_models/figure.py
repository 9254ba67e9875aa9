"""KL against bytes, every plan of a model on one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter

from allocator.report.figures import new_figure, save_figure
from benchmarks.real_models.cells import OFF_GRID
from benchmarks.real_models.ours import VOCABULARY_AT_8, kind_of

__all__ = ["draw"]

_LOOK = {
    "GAMMA, gptq candidates": ("#e15759", "o", "-"),
    "GAMMA, kfac candidates": ("#f28e2b", "o", "-"),
    "GAMMA, tuned": ("#b07aa1", "o", "-"),
    "GAMMA, learned candidates": ("#edc948", "o", "-"),
    "uniform gptq": ("#888888", "s", "--"),
    "uniform gptq, vocabulary at 8 bits": ("#bbbbbb", "v", ":"),
    "uniform, kfac candidates": ("#ffbe7d", "s", "--"),
    "uniform, tuned": ("#d4a6c8", "s", "--"),
    "uniform, learned candidates": ("#f1ce63", "s", "--"),
    "llama.cpp, with importance matrix": ("#4e79a7", "D", "none"),
    "AutoRound": ("#59a14f", "^", "none"),
    "GPTQModel": ("#9c755f", "X", "none"),
    "AutoRound AutoScheme": ("#59a14f", "P", "--"),
}
_LABELLED = ("llama.cpp", "AutoRound W", "GPTQModel")
_DECIMAL = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
_TEXTS = ("WikiText-2", "chat")


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """`path` with .png and .svg: KL (nats a token, logarithmic) by bytes of all tensors, on both texts."""
    figure = new_figure(11, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, text in zip(panels, _TEXTS, strict=True):
        for series, (colour, marker, line) in _LOOK.items():
            found = sorted((r for r in rows if _series(r) == series), key=lambda r: r["tensor_bytes"])
            x, y = [r["tensor_bytes"] / 1e6 for r in found], [r[text]["kl"] for r in found]
            if found:
                axes.plot(x, y, color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.2, label=series)
            for row in found:
                if row["row"].startswith(_LABELLED):
                    place = row["tensor_bytes"] / 1e6, row[text]["kl"]
                    name = (
                        row["row"]
                        .removeprefix("llama.cpp ")
                        .removeprefix("AutoRound ")
                        .removeprefix("GPTQModel ")
                        .replace(OFF_GRID, ", moved")
                    )
                    axes.annotate(name, place, (4, 4), textcoords="offset points", fontsize=7)
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(_DECIMAL)
        axes.set(title=text, xlabel="MB of all tensors")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("KL(original || quantized), nats a token")
    figure.suptitle(title, fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    save_figure(figure, [path.with_suffix(".png"), path.with_suffix(".svg")])


def _series(row: dict[str, Any]) -> str:
    name = row["row"]
    kind, vocabulary = kind_of(name).suffix, VOCABULARY_AT_8 in name
    if name.startswith("gamma"):
        beside_8_bits = vocabulary and "bytes of" not in name  # a budget for the blocks alone: on no line of the others
        return "" if beside_8_bits else "GAMMA" + (kind or ", gptq candidates")
    if name.startswith("uniform"):
        if kind:
            return "" if vocabulary else "uniform" + kind
        return "uniform gptq" + (", vocabulary at 8 bits" if vocabulary else "")
    if name.startswith("llama.cpp"):
        return "llama.cpp, with importance matrix"
    return next((series for series in reversed(_LOOK) if name.startswith(series)), name)
