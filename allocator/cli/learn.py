"""Build the bank of candidates and learn the scores (stage I), once for every budget.

Writes WORK/bank and WORK/scores.json. What is already there and was made with the same model, calibration text
and settings is used again.
"""

import argparse
from pathlib import Path

from allocator.cli.options import add_json, add_learning, add_model, candidate_settings, learning_settings
from allocator.cli.output import print_json, print_tables, show_progress

EXAMPLES = """examples:
  gamma learn ./Qwen3-8B --calibration text.jsonl --out work
  gamma learn ./small-model --out work --sequences 32 --sequence-length 256 --quantizer rtn"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="WORK", help="folder for bank and scores")
    add_learning(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.pipeline import learn, resolve_model
    from allocator.reporting import scores_document, scores_table

    candidates, learning = candidate_settings(args), learning_settings(args)
    with show_progress() as progress:
        result = learn(resolve_model(args.model, args.revision), args.out, candidates, learning, progress)
    if args.json:
        print_json(scores_document(result.scores) | {"scores": str(result.scores_path), "reused": result.reused})
    else:
        print_tables(scores_table(result.scores))
        used_again = f" ({', '.join(result.reused)} used again)" if result.reused else ""
        print_tables(f"scores in {result.scores_path}, candidates in {result.bank_folder}{used_again}")
