"""Check a checkpoint folder without loading it: config, manifest and safetensors headers must agree to the byte."""

import argparse
from pathlib import Path

from allocator.cli.options import add_json, add_progress
from allocator.cli.output import print_json, print_tables, show_progress

EXAMPLES = """examples:
  gamma verify Qwen3-8B-gamma
  gamma verify Qwen3-8B-gamma --digests"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="DIR")
    parser.add_argument(
        "--digests", action="store_true", help="also read every tensor and compare it with the digest of the export"
    )
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.checkpoint import check_checkpoint, check_digests
    from allocator.report.tables import manifest_tables

    _config, manifest = check_checkpoint(args.checkpoint)
    compared = 0
    if args.digests:
        with show_progress(args.progress) as progress:
            compared = check_digests(args.checkpoint, manifest, progress.bytes_of("reading tensors"))
    if args.json:
        document = {"checkpoint": str(args.checkpoint), "manifest_digest": manifest.digest, "sound": True}
        print_json(document | ({"tensors_compared": compared} if args.digests else {}))
    else:
        told = f", and its {compared} tensors are those of the export" if args.digests else ""
        print_tables(*manifest_tables(manifest), f"{args.checkpoint} is what it declares{told}")
