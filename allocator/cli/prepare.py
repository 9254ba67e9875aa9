"""Choose an assignment for the GPU at hand and write what `vllm serve` needs: once, for init containers.

Reads scores and bank from a store. Writes DIR/checkpoint, DIR/vllm.yaml, DIR/plan.json and DIR/manifest.json. The same
request with its checkpoint present has nothing to do. Every option can come from the environment: GAMMA_STORE,
GAMMA_MAX_MODEL_LEN and so on; an option on the command line wins.
"""

import argparse

from allocator.cli.deployment import add_deployment, add_store, from_environment, prepare_settings
from allocator.cli.options import add_json, add_progress
from allocator.cli.output import print_json, print_tables, show_progress

EXAMPLES = """examples:
  gamma prepare Qwen3-8B --store /store --out /served --max-model-len 8192
  gamma prepare Qwen3-8B --store s3://models/gamma --out /served --gpu l4 --kv-cache-dtype fp8
  gamma prepare Qwen3-8B --store /store --out /served --budget 5.9GiB
  vllm serve --config /served/vllm.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name or digest in the store, or a folder or hub id")
    add_store(parser)
    add_deployment(parser)
    parser.add_argument(
        "--cache-limit",
        metavar="BYTES",
        help="DIR is an entry of a node's cache (`gamma cache`): before writing, remove what lies beside it, the "
        "longest unused first and never what is in use, so that all together stays within this; e.g. 200GiB",
    )
    add_json(parser)
    add_progress(parser)
    from_environment(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.amounts import parse_budget
    from allocator.sidecar.prepare import prepare
    from allocator.sidecar.store import Store

    settings, store = prepare_settings(args), Store(args.store)
    limit = None if args.cache_limit is None else parse_budget(args.cache_limit, "--cache-limit")
    with show_progress(args.progress) as progress:
        prepared = prepare(settings, store, args.out.absolute(), progress, limit)
    if args.json:
        print_json(prepared.model_dump(mode="json", exclude_none=True))
    else:
        print_tables(
            f"{'already prepared' if prepared.unchanged else 'prepared'}: {prepared.checkpoint}, "
            f"manifest {prepared.manifest_digest}, {prepared.tensor_bytes:,} bytes of tensors",
            f"because {prepared.reason}",
            f"serve it: vllm serve --config {args.out.absolute() / 'vllm.yaml'}",
        )
