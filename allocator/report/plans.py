"""The tables of `gamma plan` and `gamma warmup`."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from allocator.plan import Plan
from allocator.plan.probe_records import ProbeRecord, RankUse
from allocator.plan.weights import WarmupSegment
from allocator.report.tables import new_table, width_text

__all__ = [
    "devices_table",
    "plan_tables",
    "probe_tables",
    "segments_table",
]

MIB, GIB = 2**20, 2**30


def plan_tables(plan: Plan) -> list[RenderableType]:
    """The lines with their basis, the weights at each width, and the verdict with what would make it yes."""
    lines = new_table(f"{plan.model}, {plan.parameters:,} parameters, on {plan.device.name}")
    for title, justify in (("", "left"), ("GiB", "right"), ("bytes", "right"), ("basis", "left"), ("", "left")):
        lines.add_column(title, justify=justify, no_wrap=title != "")  # type: ignore[arg-type]
    for line in plan.lines:
        style = "bold" if line.name in ("vLLM may use", "left for weights") else ""
        lines.add_row(
            Text(line.name, style=style), f"{line.nbytes / GIB:.3f}", f"{line.nbytes:,}", line.basis, line.note
        )
    return [lines, _widths(plan), *_verdict(plan)]


def probe_tables(record: ProbeRecord) -> list[RenderableType]:
    """What vLLM used on each rank, and the lines of a plan that this replaces."""
    table = new_table(f"{record.model} on {record.device}, vLLM {record.vllm}, MiB")
    table.add_column("rank", justify="right")
    for head in ("weights", "KV cache", "blocks", "activations", "graphs", "all else"):
        table.add_column(head, justify="right", no_wrap=True)
    for rank in record.ranks:
        sizes = (rank.weights, rank.kv_cache, rank.num_blocks, rank.activations, rank.graphs, _rest(rank))
        cells = [f"{size:,}" if i == 2 else f"{size / MIB:,.1f}" for i, size in enumerate(sizes)]
        table.add_row(str(rank.rank), *cells)
    lines = ", ".join(f"{name} {nbytes / MIB:,.1f} MiB" for name, nbytes in record.lines.items() if nbytes)
    return [table, f"plans take: {lines}"]


def _rest(rank: RankUse) -> int:
    return max(rank.consumed - rank.weights, 0)


def devices_table(plans: Sequence[Plan]) -> RenderableType:
    """One row a card, least memory first: what is left for weights, and the average bits that fit."""
    first = plans[0]
    request = first.request
    table = new_table(
        f"{first.model}: {request.max_num_seqs} x {request.max_model_len} tokens, "
        f"KV cache {request.kv_cache_dtype}, {request.tensor_parallel_size * request.pipeline_parallel_size} GPUs"
    )
    for title in ("GPU", "memory", "for weights", "bits", "fits"):
        table.add_column(title, justify="left" if title in ("GPU", "fits") else "right", no_wrap=True)
    for plan in plans:
        bits = plan.verdict.average_bits
        missing = f"no, {plan.verdict.needs_bytes / GIB:.2f} GiB short"
        table.add_row(
            _short(plan.device.name),
            f"{plan.device.total_bytes / GIB:.1f}",
            f"{plan.weight_budget_bytes / GIB:.2f}",
            "-" if bits is None else f"{bits:.2f}",
            Text("yes", style="green") if plan.verdict.fits else Text(missing, style="red"),
        )
    table.caption = "memory in GiB; bits: average of the weights that can be quantized, scales and zero points included"
    return table


def _short(name: str) -> str:
    for word in ("NVIDIA ", "GeForce ", " Generation", " Edition", " Blackwell"):
        name = name.replace(word, "")
    return name


def _widths(plan: Plan) -> Table:
    table = new_table("weights of a rank after loading, all quantizable modules at one width")
    table.add_column("")
    for entry in plan.uniform:
        table.add_column(width_text(entry.num_bits) + Text("b"), justify="right", no_wrap=True)
    table.add_row("GiB", *(f"{entry.nbytes / GIB:.2f}" for entry in plan.uniform))
    table.add_row("fits", *(Text("yes", style="green") if entry.fits else Text("no") for entry in plan.uniform))
    return table


def _verdict(plan: Plan) -> list[RenderableType]:
    if not plan.verdict.fits:
        lines = [Text(f"no: {plan.verdict.message}", style="bold red")]
        return [*lines, *(f"  {a.option} {a.value}: {a.message}" for a in plan.advice)]
    out: list[RenderableType] = [Text(f"yes: {plan.verdict.message}", style="bold green")]
    if plan.planned is not None:
        kv = plan.planned
        out.append(
            f"with weights of {kv.weight_bytes / GIB:.3f} GiB the KV cache has {kv.num_blocks:,} blocks, "
            f"{kv.tokens:,} tokens: {kv.sequences:,} sequences of {plan.request.max_model_len:,} at once"
        )
    return out


def segments_table(segments: Sequence[WarmupSegment]) -> Table:
    """One row a distinct (shape, width), and how many places of the model have it."""
    table = Table(title=f"{len(segments)} distinct products on a rank")
    for name in ("out_features", "in_features", "bits", "group", "zero points", "places"):
        table.add_column(name, justify="right")
    for s in segments:
        zeros = "no" if s.symmetric else "yes"
        table.add_row(str(s.rows), str(s.columns), str(s.num_bits), str(s.group_size), zeros, str(s.count))
    return table
