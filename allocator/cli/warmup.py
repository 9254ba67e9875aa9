"""Compile ahead what the kernels of a checkpoint need, into the cache that `vllm serve` reads.

On NVIDIA GPUs that is one kernel for each distinct (shape, width), as listed; on a CPU one library for all. Run it
where the checkpoint will be served (same GPU, same --tensor-parallel-size), for example while an image is built.
"""

import argparse
import json
import subprocess
import sys

from allocator.cli.options import add_json, add_progress
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.errors import InputError

EXAMPLES = """examples:
  gamma warmup Qwen3-8B-gamma
  gamma warmup Qwen3-32B-gamma --tensor-parallel-size 4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of `gamma export`")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="as for `vllm serve` (default: 1)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of the activations")
    parser.add_argument("--list", action="store_true", help="list the products and compile nothing")
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.plan.weights import distinct_segments, read_model
    from allocator.report.plans import segments_table

    model = read_model(args.checkpoint, args.revision)
    model.check_ranks(args.tensor_parallel_size)
    segments = distinct_segments(model, args.tensor_parallel_size)
    document = {"dtype": args.dtype, "segments": [segment.model_dump() for segment in segments]}
    if not args.list:
        command = [sys.executable, "-m", "gamma_vllm.warmup"]
        with show_progress(args.progress) as progress:
            progress.begin(f"compiling for {len(segments)} products")
            done = subprocess.run(command, input=json.dumps(document), capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise InputError(f"the plugin could not compile: {reason}")
        document |= json.loads(done.stdout.splitlines()[-1])
    if args.json:
        print_json(document)
    else:
        print_tables(segments_table(segments), *([] if args.list else [document["told"]]))
