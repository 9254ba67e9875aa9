"""Learn the codes and scales of an assignment anew, its widths and bytes unchanged, from what its blocks really get;
then the scales alone, through the whole model.

Writes a bank of the chosen candidates and a manifest of it into DIR; if they are no better on text that was not tuned
on, the manifest is of the bank as it was, and says so.
"""

import argparse
from pathlib import Path

from allocator.cli.options import add_json, add_progress, add_resume
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_folder

EXAMPLES = """examples:
  gamma tune manifest.json --model ./Qwen3-8B --bank work/bank --text text.jsonl --out tuned
  gamma export ./Qwen3-8B --manifest tuned/manifest.json --bank tuned/bank --out Qwen3-8B-gamma"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest of `gamma solve` or `refine`")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the original: a Hugging Face folder or hub id")
    parser.add_argument("--bank", type=Path, required=True, metavar="DIR", help="candidates that it was solved for")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="as --calibration of learn: text to tune and to measure on; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the tuned bank and manifest")
    parser.add_argument("--sequences", type=int, help="as for learn; 32 more are measured on")
    parser.add_argument("--sequence-length", type=int, help="as for learn")
    parser.add_argument("--seed", type=int, default=1, help="which windows of the text (default 1)")
    parser.add_argument(
        "--quantizer", default="learned-rounding", help="settings to learn with, as in learned-rounding:iterations=400"
    )
    parser.add_argument(
        "--scale-steps",
        type=int,
        default=32,
        help="steps of 32 sequences in which the scales are tuned through the whole model, after the blocks (default "
        "32; 0: not at all)",
    )
    add_resume(parser)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    check_output_folder(args.out)
    from allocator.contract.manifest import Manifest
    from allocator.pipeline import resolve_model
    from allocator.pipeline.tuning import TuneRequest, tune
    from allocator.report.tables import manifest_tables
    from allocator.run.journal import finish_step_on_sigterm

    for name in ("sequences", "sequence_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be greater than 0")
    if args.scale_steps < 0:
        raise InputError(f"--scale-steps {args.scale_steps}: must be 0 or more")
    request = TuneRequest(
        Manifest.read(args.manifest), resolve_model(args.model), args.bank, args.text, args.out,
        args.sequences, args.sequence_length, args.seed, args.quantizer, args.scale_steps, args.resume,
    )  # fmt: skip
    with finish_step_on_sigterm(), show_progress(args.progress) as progress:
        found = tune(request, progress)
    if args.json:
        print_json(found.payload() | {"digest": found.digest})
    else:
        assert found.tuning is not None
        bank = args.out / "bank" if found.tuning.kept == "tuned" else args.bank
        print_tables(*manifest_tables(found), f"its bank: {bank}")
