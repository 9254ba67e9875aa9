"""Tables and documents of what the other parts computed: plain data in, rich renderables or dictionaries out."""

from allocator.reporting.documents import export_document, inventory_document, scores_document
from allocator.reporting.summaries import export_table, manifest_tables, scores_table
from allocator.reporting.tables import bytes_table, inventory_table, widths_table

__all__ = [
    "bytes_table",
    "export_document",
    "export_table",
    "inventory_document",
    "inventory_table",
    "manifest_tables",
    "scores_document",
    "scores_table",
    "widths_table",
]
