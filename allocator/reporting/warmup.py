"""The products of a checkpoint as a table."""

from collections.abc import Sequence

from rich.table import Table

from allocator.fitting.segments import WarmupSegment

__all__ = ["segments_table"]


def segments_table(segments: Sequence[WarmupSegment]) -> Table:
    """One row a distinct (shape, width), and how many places of the model have it."""
    table = Table(title=f"{len(segments)} distinct products on a rank")
    for name in ("out_features", "in_features", "bits", "group", "zero points", "places"):
        table.add_column(name, justify="right")
    for s in segments:
        zeros = "no" if s.symmetric else "yes"
        table.add_row(str(s.rows), str(s.columns), str(s.num_bits), str(s.group_size), zeros, str(s.count))
    return table
