"""Show what is in a model: modules, shapes, fused groups, bytes at every width, feasible budgets.

Reads config.json and the headers of the safetensors files only.
"""

import argparse

from allocator.cli.options import add_json, add_model
from allocator.cli.output import print_json, print_tables
from allocator.contract.layout import GROUP_SIZES, WIDTHS

EXAMPLES = """examples:
  gamma inspect ./Qwen3-8B
  gamma inspect ./Qwen3-8B --group-size 64 --symmetric --json
  gamma inspect ./brand-new-model --from-model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
    parser.add_argument("--symmetric", action="store_true", help="no zero points (default: asymmetric)")
    parser.add_argument(
        "--from-model",
        action="store_true",
        help="find the structure of an architecture that gamma does not know, with the transformers and vLLM installed "
        "here, and keep it for the other verbs",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.model import read_inventory
    from allocator.pipeline import resolve_model
    from allocator.pipeline.discovering import discover
    from allocator.report.documents import inventory_document
    from allocator.report.tables import inventory_table

    folder = resolve_model(args.model, args.revision)
    if args.from_model:
        discover(folder)
    inventory = read_inventory(folder)
    if args.json:
        print_json(inventory_document(inventory, args.group_size, args.symmetric))
    else:
        print_tables(inventory_table(inventory, WIDTHS, args.group_size, args.symmetric))
