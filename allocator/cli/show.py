"""Show an assignment: the width of every module, its bytes, and a heat map over the blocks."""

import argparse
from pathlib import Path

from allocator.cli.options import add_figure, add_output
from allocator.cli.output import print_csv, print_json, print_tables

EXAMPLES = """examples:
  gamma show manifest.json
  gamma show Qwen3-8B-gamma --figure widths.png --figure widths.svg
  gamma show manifest.json --csv > widths.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a manifest, or the folder of a checkpoint")
    add_figure(parser, "the heat map")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.report.differences import read_manifest
    from allocator.report.documents import manifest_rows
    from allocator.report.figures import check_figure_path, save_figure
    from allocator.report.heatmap import draw_heatmap
    from allocator.report.tables import manifest_tables, manifest_title

    figures = [check_figure_path(path) for path in args.figure]
    manifest = read_manifest(args.manifest)
    if figures:
        save_figure(draw_heatmap({manifest_title(manifest): manifest.modules}), figures)
    if args.json:
        print_json(manifest.payload() | {"digest": manifest.digest})
    elif args.csv:
        rows = manifest_rows(manifest)
        print_csv(list(rows[0]) if rows else ["module"], rows)
    else:
        print_tables(*manifest_tables(manifest))
