"""Build the bank of candidates and learn the scores (stage I), once for every budget.

Writes WORK/bank and WORK/scores.json. What is already there and was made with the same model, calibration text
and settings is used again. A run that was killed goes on where it stood when the same command is given again, to the
same result; SIGTERM lets it finish its step and ends it with exit code 75. Under torchrun the processes share the
calibration sequences.
"""

import argparse
from pathlib import Path

from allocator.cli.options import (
    add_json,
    add_learning,
    add_model,
    add_progress,
    add_resume,
    candidate_settings,
    learning_settings,
)
from allocator.cli.output import leads, print_json, print_tables, show_progress
from allocator.contract.outputs import check_output_folder

EXAMPLES = """examples:
  gamma learn ./Qwen3-8B --calibration text.jsonl --out work
  gamma learn ./small-model --out work --sequences 32 --sequence-length 256 --quantizer rtn
  torchrun --no-python --nproc-per-node 4 gamma learn ./Qwen3-8B --calibration text.jsonl --out work"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="WORK", help="folder for bank and scores")
    add_learning(parser)
    add_resume(parser)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.pipeline import learn, resolve_model
    from allocator.report.documents import scores_document
    from allocator.report.tables import scores_table
    from allocator.run.journal import finish_step_on_sigterm

    check_output_folder(args.out)
    candidates, learning = candidate_settings(args), learning_settings(args)
    with finish_step_on_sigterm(), show_progress(args.progress) as progress:
        result = learn(resolve_model(args.model, args.revision), args.out, candidates, learning, progress, args.resume)
    if not leads():
        return
    if args.json:
        print_json(scores_document(result.scores) | {"scores": str(result.scores_path), "reused": result.reused})
    else:
        print_tables(scores_table(result.scores))
        used_again = f" ({', '.join(result.reused)} used again)" if result.reused else ""
        print_tables(f"scores in {result.scores_path}, candidates in {result.bank_folder}{used_again}")
