"""Print the JSON Schema of one of the project's files."""

import argparse

from allocator.cli.output import print_json

EXAMPLES = """examples:
  gamma schema manifest
  gamma schema gpus"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        choices=["bank", "scores", "manifest", "checkpoint", "plan", "gpus", "probe", "kv_cache", "digests", "share"],
    )


def run(args: argparse.Namespace) -> None:
    from allocator.contract.bank import Bank
    from allocator.contract.checkpoint import CheckpointConfig, TensorDigests
    from allocator.contract.documents import Document
    from allocator.contract.manifest import Manifest
    from allocator.contract.scores import KvCacheScores, Scores
    from allocator.plan import Catalogue, Plan
    from allocator.plan.probe_records import ProbeRecord
    from allocator.sidecar.sharing import Share

    if args.name == "checkpoint":
        print_json(CheckpointConfig.model_json_schema())
    elif args.name == "gpus":
        print_json(Catalogue.published_schema())
    else:
        documents: dict[str, type[Document]] = {
            "bank": Bank, "scores": Scores, "manifest": Manifest, "plan": Plan, "probe": ProbeRecord,
            "kv_cache": KvCacheScores, "digests": TensorDigests, "share": Share,
        }  # fmt: skip
        print_json(documents[args.name].published_schema())
