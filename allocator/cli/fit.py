"""From a model to a checkpoint that fits a budget: learn, solve and export in one step.

The work folder keeps candidates and scores, so that the same command with another budget only solves and exports.
"""

import argparse
from pathlib import Path

from allocator.cli.options import (
    add_budget,
    add_json,
    add_learning,
    add_model,
    add_resume,
    candidate_settings,
    learning_settings,
    solve_settings,
)
from allocator.cli.output import print_json, print_tables, show_progress

EXAMPLES = """examples:
  gamma fit ./Qwen3-8B --budget 5.2GiB --calibration text.jsonl --out Qwen3-8B-gamma
  gamma fit ./Qwen3-8B --average-bits 3.5 --calibration text.jsonl --out Qwen3-8B-3.5bit
  vllm serve Qwen3-8B-gamma"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_budget(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, help="folder for candidates and scores (default: OUT-work)")
    parser.add_argument("--overwrite", action="store_true", help="replace a gamma checkpoint at --out")
    add_learning(parser)
    add_resume(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.pipeline import fit, resolve_model
    from allocator.reporting import export_document, export_table, manifest_tables
    from allocator.running import finish_step_on_sigterm

    candidates, learning = candidate_settings(args), learning_settings(args)
    work = args.work or args.out.with_name(args.out.name + "-work")
    with finish_step_on_sigterm(), show_progress() as progress:
        model = resolve_model(args.model, args.revision)
        manifest, report = fit(
            model, work, args.out, solve_settings(args), candidates, learning,
            overwrite=args.overwrite, progress=progress, resume=args.resume,
        )  # fmt: skip
    if args.json:
        print_json(export_document(report) | {"manifest": manifest.payload() | {"digest": manifest.digest}})
    else:
        print_tables(*manifest_tables(manifest), export_table(report), f"serve it: vllm serve {args.out}")
