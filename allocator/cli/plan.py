"""Plan a GPU's memory for a model and its traffic: what is left for the weights, and whether that is enough.

Reads config.json only: a folder, or of a hub id that one file. Without a GPU it says which cards do. For a gamma
checkpoint it says how many tokens and sequences its KV cache holds. The exit code is 0 for yes and 4 for no, with
--json too; without a GPU it is 4 if no card does.
"""

import argparse
import shlex
from pathlib import Path

from allocator.cli.options import add_json, add_model
from allocator.cli.output import print_json, print_tables
from allocator.cli.planning import (
    add_device,
    add_probe,
    add_traffic,
    catalogue_of,
    device_of,
    plan_request,
    probe_of,
    sequences_note,
)
from allocator.contract.errors import InfeasibleBudgetError
from allocator.contract.layout import GROUP_SIZES
from allocator.contract.outputs import check_output_file

EXAMPLES = """examples:
  gamma plan Qwen/Qwen3-32B --gpu rtx4090 --max-model-len 16384 --max-num-seqs 4 --kv-cache-dtype fp8
  gamma plan ./Qwen3-8B --gpu-memory 12GiB --max-model-len 8192 --out plan.json
  gamma plan ./Qwen3-8B-gamma --gpu l4 --max-model-len 8192
  gamma plan ./Qwen3-32B --max-model-len 32768 --max-num-seqs 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_device(parser)
    add_traffic(parser)
    add_probe(parser)
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128, help="of the candidates")
    parser.add_argument("--symmetric", action="store_true", help="candidates without zero points")
    parser.add_argument(
        "--out", type=Path, metavar="PLAN", help="write the plan to this file, for `gamma solve --plan`"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0 for yes; the code of a budget that cannot be met for no, so that a script need not read the answer."""
    from allocator.plan.plan import PlannedWeights, make_plan, plans_of_catalogue
    from allocator.plan.vllm_arguments import vllm_arguments
    from allocator.plan.weights import read_model
    from allocator.report.plans import devices_table, plan_tables

    if args.out is not None:
        check_output_file(args.out)
    request = plan_request(args)
    device = device_of(args, request.tensor_parallel_size)
    model = read_model(args.model, args.revision)
    model.check_ranks(request.tensor_parallel_size)
    weights = PlannedWeights(args.group_size, args.symmetric, model.formats)
    if device is None:
        plans = plans_of_catalogue(model.shape, catalogue_of(args), request, model=model.name, weights=weights)
        if args.json:
            print_json([plan.payload() for plan in plans])
        else:
            print_tables(devices_table(plans))
        return 0 if any(plan.verdict.fits for plan in plans) else InfeasibleBudgetError.exit_code
    probe = probe_of(args, model.shape, device, request)
    plan = make_plan(model.shape, device, request, model=model.name, weights=weights, probe=probe)
    if args.out is not None:
        plan.write(args.out)
    if args.json:
        print_json(plan.payload() | {"digest": plan.digest})
    else:
        print_tables(*plan_tables(plan), *filter(None, [sequences_note(args, plan)]))
        if model.formats is not None and plan.verdict.fits:
            print_tables("serve it: " + shlex.join(vllm_arguments(plan, args.model)))
    return 0 if plan.verdict.fits else InfeasibleBudgetError.exit_code
