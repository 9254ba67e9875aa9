"""Check a checkpoint folder without loading it: config, manifest and safetensors headers must agree to the byte."""

import argparse
from pathlib import Path

from allocator.cli.options import add_json
from allocator.cli.output import print_json, print_tables

EXAMPLES = """examples:
  gamma verify Qwen3-8B-gamma"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="DIR")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.checkpoint import check_checkpoint
    from allocator.reporting import manifest_tables

    _config, manifest = check_checkpoint(args.checkpoint)
    if args.json:
        print_json({"checkpoint": str(args.checkpoint), "manifest_digest": manifest.digest, "sound": True})
    else:
        print_tables(*manifest_tables(manifest), f"{args.checkpoint} is what it declares")
