"""Find the assignment of least score that fits a budget, exactly (stage II).

The budget counts every tensor of the checkpoint, or with --plan what a rank of vLLM holds after loading. Takes
seconds at most and needs nothing but the scores.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from allocator.cli.options import add_budget, add_json, add_measuring, measure_student, rules, solve_settings
from allocator.cli.output import print_json, print_tables
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


def run(args: argparse.Namespace) -> None:
    from allocator.contract.scores import Scores
    from allocator.fitting import Plan
    from allocator.reporting.summaries import manifest_tables
    from allocator.solving import solve_resident, solve_scores

    if args.out is not None:
        check_output_file(args.out)
    scores, settings = Scores.read(args.scores), solve_settings(args)
    plan = None if args.plan is None else Plan.read(args.plan)
    if plan is None:
        manifest = solve_scores(scores, settings)
    else:
        requested = f"plan for {plan.device.name}"
        manifest = solve_resident(scores, settings, plan.residency, plan.weight_budget_bytes, requested)
    if args.verify:
        from allocator.refining import verify

        residency = None if plan is None else plan.residency
        manifest = verify(manifest, scores, measure_student(args, args.scores), rules(args), residency)
    if args.out is not None:
        manifest.write(args.out)
    if args.json:
        print_json(manifest.payload() | {"digest": manifest.digest})
    else:
        print_tables(*manifest_tables(manifest))
        if settings.fusion == "tied" and args.plan is None and manifest.proof is not None:
            free = solve_scores(scores, replace(settings, fusion="free"))
            assert free.proof is not None
            price = manifest.proof.objective / free.proof.objective - 1 if free.proof.objective else 0.0
            print_tables(f"one width a fused layer costs {price:.1%} of predicted loss at this budget")
