"""Improve an assignment for its budget: changes of one or two modules, kept when the measured KL divergence falls.

Starts from what `gamma solve` found and never goes over its budget. Pins, ceilings and floors must be given again.
"""

import argparse
from pathlib import Path

from allocator.cli.options import add_json, add_measuring, add_progress, add_rules, measure_student, rules
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_file

EXAMPLES = """examples:
  gamma refine manifest.json --scores work/scores.json --model ./Qwen3-8B --text text.txt --out better.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest of `gamma solve`")
    parser.add_argument("--scores", type=Path, required=True, metavar="SCORES", help="scores that it was solved from")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most this long (default 10)")
    parser.add_argument("--out", type=Path, metavar="MANIFEST", help="write the manifest to this file")
    add_measuring(parser)
    add_rules(parser)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.manifest import Manifest
    from allocator.contract.scores import Scores
    from allocator.evaluate import refine_manifest
    from allocator.report.tables import manifest_tables

    if not args.minutes > 0:
        raise InputError(f"--minutes {args.minutes}: must be greater than 0")
    if args.fusion == "tied":
        raise InputError("refine changes modules one by one; it cannot keep --fusion tied")
    if args.out is not None:
        check_output_file(args.out)
    manifest, scores = Manifest.read(args.manifest), Scores.read(args.scores)
    with show_progress(args.progress) as progress:
        student = measure_student(args, args.scores, progress)
        found = refine_manifest(manifest, scores, student, args.minutes, rules(args), progress)
    if args.out is not None:
        found.write(args.out)
    if args.json:
        print_json(found.payload() | {"digest": found.digest})
    else:
        print_tables(*manifest_tables(found))
