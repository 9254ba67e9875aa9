"""Find the assignment of least score that fits a budget, exactly (stage II).

The budget counts every tensor of the checkpoint. Takes seconds at most and needs nothing but the scores.
"""

import argparse
from pathlib import Path

from allocator.cli.options import add_budget, add_json, solve_settings
from allocator.cli.output import print_json, print_tables

EXAMPLES = """examples:
  gamma solve work/scores.json --budget 5.9GiB --out manifest.json
  gamma solve work/scores.json --average-bits 3.0 --out manifest.json
  gamma solve work/scores.json --budget 6GB --pin '*.layers.0.*=8' --fusion tied"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", type=Path, metavar="SCORES", help="scores.json of `gamma learn`")
    add_budget(parser)
    parser.add_argument("--out", type=Path, metavar="MANIFEST", help="write the manifest to this file")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.scores import Scores
    from allocator.pipeline import solve_scores
    from allocator.reporting import manifest_tables

    manifest = solve_scores(Scores.read(args.scores), solve_settings(args))
    if args.out is not None:
        manifest.write(args.out)
    if args.json:
        print_json(manifest.payload() | {"digest": manifest.digest})
    else:
        print_tables(*manifest_tables(manifest))
