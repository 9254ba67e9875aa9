"""Measure what an fp8 KV cache costs: KL divergence from the model with its own KV cache, on text.

Writes kv_cache.json, for `--kv-cache-dtype auto-choose`. The model must fit into memory.
"""

import argparse
from pathlib import Path

from allocator.cli.options import add_json, add_model, add_progress
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_file

EXAMPLES = """examples:
  gamma kv ./Qwen3-8B --calibration text.jsonl --out work/kv_cache.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="kv_cache.json to write")
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        metavar="FILE",
        help="text (as --calibration of learn), may be repeated; without it the model writes its own",
    )
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512, help="at most what the model allows")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.pipeline import resolve_model
    from allocator.pipeline.measure import TextSettings, measure_kv_losses

    check_output_file(args.out)
    for name in ("sequences", "sequence_length"):
        if getattr(args, name) < 2 - (name == "sequences"):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: too few")
    with show_progress(args.progress) as progress:
        model = resolve_model(args.model, args.revision)
        text = TextSettings(args.calibration, args.sequences, args.sequence_length, args.seed)
        measured = measure_kv_losses(model, text, args.out.parent, progress)
    measured.write(args.out)
    if args.json:
        print_json(measured.payload() | {"digest": measured.digest})
    else:
        lines = [f"KV cache {dtype}: {loss:.4g} {measured.unit}" for dtype, loss in measured.losses.items()]
        print_tables(*lines, f"on {measured.tokens:,} tokens; written to {args.out}")
