"""Show what changed between two assignments of one model: widths, bytes, predicted loss."""

import argparse
from pathlib import Path

from allocator.cli.options import add_figure, add_output
from allocator.cli.output import print_csv, print_json, print_tables

EXAMPLES = """examples:
  gamma diff manifest-3bit.json manifest-4bit.json --scores work/scores.json
  gamma diff Qwen3-8B-gamma manifest.json --csv > changes.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("before", "after"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="a manifest, or the folder of a checkpoint")
    parser.add_argument(
        "--scores",
        type=Path,
        help="scores.json: what each change is predicted to cost (default: the totals that the manifests record)",
    )
    add_figure(parser, "both heat maps")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.scores import Scores
    from allocator.report.differences import (
        COLUMNS,
        compare,
        comparison_document,
        comparison_tables,
        read_manifest,
        row_of,
    )
    from allocator.report.figures import check_figure_path, save_figure
    from allocator.report.heatmap import draw_heatmap
    from allocator.report.tables import manifest_title

    figures = [check_figure_path(path) for path in args.figure]
    scores = None if args.scores is None else Scores.read(args.scores)
    comparison = compare(read_manifest(args.before), read_manifest(args.after), scores)
    if figures:
        sides = ("before", comparison.before), ("after", comparison.after)
        panels = {f"{side}: {manifest_title(manifest)}": manifest.modules for side, manifest in sides}
        save_figure(draw_heatmap(panels), figures)
    if args.json:
        print_json(comparison_document(comparison))
    elif args.csv:
        print_csv(COLUMNS, [row_of(change) for change in comparison.changes])
    else:
        print_tables(*comparison_tables(comparison))
