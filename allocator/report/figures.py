"""What all figures have in common: one plain style, PNG or SVG by the file's name, matplotlib loaded late."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_file

__all__ = ["check_figure_path", "new_figure", "save_figure"]

_SUFFIXES = (".png", ".svg")
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "gamma",
}


def check_figure_path(path: Path) -> Path:
    """`path` if a figure can be written there. Raises InputError, also for another suffix than .png and .svg."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"figure {path}: the name must end in {' or '.join(_SUFFIXES)}")
    check_output_file(path, "--figure")
    return path


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of `width` x `height` inches. Raises InputError where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            f"a figure needs the package {error.name}, which is not installed: pip install 'gamma-vllm[report]'; "
            "the table, --csv and --json need nothing"
        ) from None
    matplotlib.rcParams.update(_STYLE)
    return Figure(figsize=(width, height))


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Write `figure` to every path, each atomically; the same figure gives the same bytes."""
    if (layout := figure.get_layout_engine()) is not None:  # once, so that each file has the same places
        layout.execute(figure)
        figure.set_layout_engine("none")
    for path in map(check_figure_path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            kind = path.suffix[1:].lower()
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
