"""A sweep as a table, as rows, and as a figure: gibibytes against loss, uniform plans and GPUs beside the curve."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from allocator.report.figures import new_figure
from allocator.report.recorded import Recorded, recorded_row, recorded_table
from allocator.report.tables import new_table
from allocator.solve.many_budgets import SolvedBudget, UniformPlan

__all__ = [
    "SWEEP_COLUMNS",
    "Mark",
    "Sweep",
    "draw_sweep",
    "key_of_point",
    "key_of_uniform",
    "sweep_document",
    "sweep_rows",
    "sweep_table",
]

SWEEP_COLUMNS = (
    "gpu", "budget_bytes", "tensor_bytes", "average_bits", "predicted_loss", "gap", "measured_loss",
    "uniform_bits", "uniform_tensor_bytes", "uniform_predicted_loss", "uniform_measured_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """A GPU on the axis.

    `budget_bytes` is what it leaves for the weights of a rank, `point` the assignment for it (None: `message` says why
    nothing fits), `price` $ a month for all its ranks.
    """

    gpu: str
    budget_bytes: int
    point: SolvedBudget | None
    message: str
    price: float | None = None


@dataclass(frozen=True)
class Sweep:
    """What `gamma sweep` found. `measured` are losses by `key_of_point` and `key_of_uniform`, empty when none was
    asked for; `recorded` are those of manifests that were given."""

    model: str
    unit: str
    points: list[SolvedBudget]
    uniform: list[UniformPlan]
    marks: list[Mark]
    measured: dict[str, float]
    measured_unit: str = ""
    recorded: list[Recorded] = field(default_factory=list)


def key_of_point(point: SolvedBudget) -> str:
    """The key of its measured loss in `Sweep.measured`."""
    return f"solved {point.budget_bytes}"


def key_of_uniform(plan: UniformPlan) -> str:
    """The key of its measured loss in `Sweep.measured`."""
    return f"uniform {plan.num_bits}"


def sweep_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a budget, then one a GPU that something fits; the keys are `SWEEP_COLUMNS`."""
    rows = [_row(sweep, "", point) for point in sweep.points]
    rows += [_row(sweep, mark.gpu, mark.point) for mark in sweep.marks if mark.point is not None]
    return rows


def sweep_document(sweep: Sweep) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "model": sweep.model,
        "unit": sweep.unit,
        "measured_unit": sweep.measured_unit or None,
        "rows": sweep_rows(sweep),
        "uniform": [
            {
                "num_bits": plan.num_bits,
                "tensor_bytes": plan.tensor_bytes,
                "average_bits": plan.average_bits,
                "predicted_loss": plan.objective,
                "measured_loss": sweep.measured.get(key_of_uniform(plan)),
            }
            for plan in sweep.uniform
        ],
        "gpus": [
            {
                "gpu": mark.gpu,
                "weight_budget_bytes": mark.budget_bytes,
                "fits": mark.point is not None,
                "message": mark.message,
                "dollars_a_month": mark.price,
            }
            for mark in sweep.marks
        ],
        "recorded": [recorded_row(found) for found in sweep.recorded],
    }


def sweep_table(sweep: Sweep) -> RenderableType:
    """What each budget buys, and what the best uniform plan in the same budget would cost."""
    unit, divisor = _unit(sweep)
    table = new_table(f"{sweep.model}: what each budget buys")
    named = any(mark.point is not None for mark in sweep.marks)
    columns = [
        *(["GPU"] if named else []),
        *([] if sweep.measured else [f"rank {unit}" if named else f"budget {unit}"]),
        unit,
        "bits",
    ]
    loss = ["predicted", "measured"] if sweep.measured else ["predicted"]
    for head in (*columns, *loss, "uniform", *loss):
        table.add_column(head, justify="left" if head == "GPU" else "right", no_wrap=True)
    points = [("", point) for point in sweep.points] if not named else []
    points += [(mark.gpu, mark.point) for mark in sweep.marks if mark.point is not None]
    for gpu, point in points:
        table.add_row(*_cells(sweep, gpu, point, named, divisor))
    lines = [Text(f"loss: {sweep.unit}")]
    if sweep.measured:
        lines.append(Text(f"measured: {sweep.measured_unit}"))
    lines += [Text(f"{mark.gpu}: {mark.message}") for mark in sweep.marks if mark.message]
    lines += [Text(line) for line in _savings(sweep.marks)]
    return Group(table, *lines, *recorded_table(sweep.recorded))


def draw_sweep(sweep: Sweep) -> Any:
    """A figure of the curve: bytes of tensors below, average bits above, loss on a logarithmic axis.

    Uniform plans are crosses with their width, GPUs are dashed lines at the best that fits on them. What lies
    beyond the curve is left out.
    """
    figure = new_figure(7.0, 4.6)
    axes = figure.add_subplot()
    unit, divisor = _unit(sweep)
    solved = sweep.points + [m.point for m in sweep.marks if m.point is not None]
    solved.sort(key=lambda point: point.solution.tensor_bytes)
    low, high = solved[0].solution.tensor_bytes, solved[-1].solution.tensor_bytes
    margin = 0.04 * (high - low) or 0.05 * high
    axes.set_xlim((low - margin) / divisor, (high + margin) / divisor)
    sizes = [point.solution.tensor_bytes / divisor for point in solved]
    losses = [point.solution.objective for point in solved]
    marker = "o" if len(solved) <= 40 else ""
    axes.plot(sizes, losses, color="black", marker=marker, markersize=3.5, linewidth=1.3, label="solved, predicted")
    axes.margins(y=0.09)
    if sweep.measured:
        shown = [(s, sweep.measured.get(key_of_point(p))) for s, p in zip(sizes, solved, strict=True)]
        _draw_known(axes, shown, color="black", marker="s", linestyle=":", fillstyle="none", label="solved, measured")
    known = [(r.tensor_bytes / divisor, r.measured_loss) for r in sweep.recorded if low <= r.tensor_bytes <= high]
    _draw_known(axes, known, color="black", marker="D", linestyle="none", label="measured, as recorded")
    uniform = [plan for plan in sweep.uniform if low - margin <= plan.tensor_bytes <= high + margin]
    _draw_uniform(axes, sweep, uniform, divisor)
    if all(loss > 0 for loss in losses):
        axes.set_yscale("log")
    _draw_marks(axes, sweep, (low - margin, high + margin), divisor)
    axes.set_xlabel(f"{unit} of all tensors of the checkpoint")
    axes.set_ylabel(_short_unit(sweep.unit))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    _add_bits_axis(axes, solved, divisor)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    axes.set_title(f"{sweep.model}: what a budget buys", pad=12)
    return figure


def _draw_uniform(axes: Any, sweep: Sweep, plans: Sequence[UniformPlan], divisor: int) -> None:
    if not plans:
        return
    style = {"color": "0.35", "linestyle": "none", "markersize": 7.0}
    sizes = [plan.tensor_bytes / divisor for plan in plans]
    axes.plot(sizes, [plan.objective for plan in plans], marker="x", label="uniform, predicted", **style)
    for plan, size in zip(plans, sizes, strict=True):
        axes.annotate(
            f"{plan.num_bits} bits", (size, plan.objective), xytext=(5, 4), textcoords="offset points", fontsize=8,
            color="0.25",
        )  # fmt: skip
    shown = [(size, sweep.measured.get(key_of_uniform(plan))) for plan, size in zip(plans, sizes, strict=True)]
    _draw_known(axes, shown, marker="+", label="uniform, measured", **style)


def _draw_known(axes: Any, points: Sequence[tuple[float, float | None]], **style: Any) -> None:
    known = [(x, y) for x, y in points if y is not None and y > 0]
    if known:
        axes.plot(*zip(*known, strict=True), **({"linewidth": 1.0, "markersize": 4.0} | style))


def _draw_marks(axes: Any, sweep: Sweep, limits: tuple[float, float], divisor: int) -> None:
    """Dashed lines at the assignments of the GPUs; names at the foot, those of near lines moved apart."""
    marks = sorted((m.point.solution.tensor_bytes, m.gpu) for m in sweep.marks if m.point is not None)
    if marks and axes.get_yscale() == "log":  # room for the names below the curve
        lowest, highest = axes.get_ylim()
        axes.set_ylim(lowest / (highest / lowest) ** 0.15, highest)
    span, right = limits[1] - limits[0], float("-inf")
    for size, gpu in marks:
        axes.axvline(size / divisor, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        place = max(size - 0.012 * span, right + 0.028 * span)
        right = place
        axes.text(
            place / divisor, 0.02, gpu, rotation=90, ha="right", va="bottom", fontsize=8, color="0.25",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _add_bits_axis(axes: Any, solved: Sequence[SolvedBudget], divisor: int) -> None:
    """Average bits are a linear function of bytes: the two outermost points give it."""
    first, last = solved[0], solved[-1]
    if first.average_bits == last.average_bits:
        return
    slope = (last.average_bits - first.average_bits) / (last.solution.tensor_bytes - first.solution.tensor_bytes)
    start = first.average_bits - slope * first.solution.tensor_bytes
    upper = axes.secondary_xaxis(
        "top", functions=(lambda x: start + slope * divisor * x, lambda b: (b - start) / slope / divisor)
    )
    upper.set_xlabel("average bits a weight, scales and zero points included")


def _row(sweep: Sweep, gpu: str, point: SolvedBudget) -> dict[str, Any]:
    plan = point.uniform
    values = (
        gpu, point.budget_bytes, point.solution.tensor_bytes, point.average_bits, point.solution.objective,
        point.solution.gap, sweep.measured.get(key_of_point(point)),
        None if plan is None else plan.num_bits, None if plan is None else plan.tensor_bytes,
        None if plan is None else plan.objective, None if plan is None else sweep.measured.get(key_of_uniform(plan)),
    )  # fmt: skip
    return dict(zip(SWEEP_COLUMNS, values, strict=True))


def _cells(sweep: Sweep, gpu: str, point: SolvedBudget, named: bool, divisor: int) -> list[str]:
    row = _row(sweep, gpu, point)
    cells = [gpu] if named else []
    cells += [] if sweep.measured else [f"{point.budget_bytes / divisor:.3f}"]
    cells += [f"{point.solution.tensor_bytes / divisor:.3f}"]
    cells += [f"{point.average_bits:.3f}", f"{point.solution.objective:.3g}"]
    cells += [_number(row["measured_loss"])] if sweep.measured else []
    cells += [
        "-" if point.uniform is None else f"{point.uniform.num_bits} bits",
        _number(row["uniform_predicted_loss"]),
    ]
    return cells + ([_number(row["uniform_measured_loss"])] if sweep.measured else [])


def _savings(marks: Sequence[Mark]) -> list[str]:
    """What each GPU saves against the next dearer one on which the model fits too."""
    priced = [(m.price, m.gpu, m.point.solution.objective) for m in marks if m.price is not None and m.point]
    lines = []
    for (price, small, loss), (dearer, large, better) in pairwise(sorted(priced)):
        lines.append(
            f"{small} instead of {large} saves ${dearer - price:,.0f} a month "
            f"(${price:,.0f} instead of ${dearer:,.0f}); predicted loss {loss:.4g} instead of {better:.4g}"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _unit(sweep: Sweep) -> tuple[str, int]:
    sizes = [p.budget_bytes for p in sweep.points] + [m.budget_bytes for m in sweep.marks]
    return ("GiB", 2**30) if max(sizes) >= 0.1 * 2**30 else ("MiB", 2**20)


def _short_unit(unit: str) -> str:
    """A unit may be a sentence; an axis has room for its first clause."""
    return f"loss: {unit.partition(',')[0]}"
