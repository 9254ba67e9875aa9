"""Tables and documents of what the other parts computed: plain data in, rich renderables or dictionaries out."""

from allocator.reporting.differences import compare, comparison_document, comparison_tables, read_manifest
from allocator.reporting.documents import export_document, inventory_document, manifest_rows, scores_document
from allocator.reporting.figures import check_figure_path, save_figure
from allocator.reporting.heatmap import draw_heatmap
from allocator.reporting.pareto import draw_sweep, sweep_document, sweep_rows, sweep_table
from allocator.reporting.summaries import export_table, manifest_tables, manifest_title, scores_table
from allocator.reporting.tables import bytes_table, inventory_table, widths_table

__all__ = [
    "bytes_table",
    "check_figure_path",
    "compare",
    "comparison_document",
    "comparison_tables",
    "draw_heatmap",
    "draw_sweep",
    "export_document",
    "export_table",
    "inventory_document",
    "inventory_table",
    "manifest_rows",
    "manifest_tables",
    "manifest_title",
    "read_manifest",
    "save_figure",
    "scores_document",
    "scores_table",
    "sweep_document",
    "sweep_rows",
    "sweep_table",
    "widths_table",
]
