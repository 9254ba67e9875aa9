"""Find the assignment of least score that fits a budget, exactly (stage II).

The budget counts every tensor of the checkpoint, or with --plan what a rank of vLLM holds after loading. Takes
seconds at most and needs nothing but the scores.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from allocator.cli.options import (
    add_budget,
    add_json,
    add_measuring,
    add_progress,
    measure_student,
    rules,
    solve_settings,
)
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.outputs import check_output_file

EXAMPLES = """examples:
  gamma solve work/scores.json --budget 5.9GiB --out manifest.json
  gamma solve work/scores.json --average-bits 3.0 --out manifest.json
  gamma solve work/scores.json --plan plan.json --out manifest.json
  gamma solve work/scores.json --budget 5.9GiB --verify --model ./Qwen3-8B --text held-out.txt --out manifest.json
  gamma solve work/scores.json --budget 6GB --pin '*.layers.0.*=8' --fusion tied"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", type=Path, metavar="SCORES", help="scores.json of `gamma learn`")
    add_budget(parser, plan=True)
    parser.add_argument("--out", type=Path, metavar="MANIFEST", help="write the manifest to this file")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="measure the assignment and the best uniform plan of the same bytes, and keep the better one",
    )
    add_measuring(parser)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.manifest import Manifest
    from allocator.contract.scores import Scores
    from allocator.plan import Plan
    from allocator.plan.fusion import fusion_price
    from allocator.report.tables import manifest_tables
    from allocator.solve import SolveSettings, solve_resident, solve_scores

    if args.out is not None:
        check_output_file(args.out)
    scores = Scores.read(args.scores)
    plan = None if args.plan is None else Plan.read(args.plan)
    settings = solve_settings(args, plan)

    def solved(settings: SolveSettings) -> Manifest:
        if plan is None:
            return solve_scores(scores, settings)
        requested = f"plan for {plan.device.name}"
        return solve_resident(scores, settings, plan.residency, plan.weight_budget_bytes, requested)

    manifest = solved(settings)
    if args.verify:
        from allocator.evaluate import verify_against_uniform

        residency = None if plan is None else plan.residency
        with show_progress(args.progress) as progress:
            student = measure_student(args, args.scores, progress)
            manifest = verify_against_uniform(manifest, scores, student, rules(args), residency, progress)
    if args.out is not None:
        manifest.write(args.out)
    if args.json:
        print_json(manifest.payload() | {"digest": manifest.digest})
    else:
        print_tables(*manifest_tables(manifest))
        if settings.fusion == "tied" and manifest.proof is not None:
            print_tables(fusion_price(manifest, lambda: solved(replace(settings, fusion="free"))))
