"""Print the JSON Schema of one of the project's files."""

import argparse

from allocator.cli.output import print_json

EXAMPLES = """examples:
  gamma schema manifest"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["bank", "scores", "manifest", "checkpoint"])


def run(args: argparse.Namespace) -> None:
    from allocator.contract.bank import Bank
    from allocator.contract.checkpoint import CheckpointConfig
    from allocator.contract.documents import Document
    from allocator.contract.manifest import Manifest
    from allocator.contract.scores import Scores

    if args.name == "checkpoint":
        print_json(CheckpointConfig.model_json_schema())
    else:
        documents: dict[str, type[Document]] = {"bank": Bank, "scores": Scores, "manifest": Manifest}
        print_json(documents[args.name].published_schema())
