"""From a model to a checkpoint that fits a budget: learn, solve and export in one step.

The work folder keeps candidates and scores, so that the same command with another budget only solves and exports.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.options import (
    add_budget,
    add_json,
    add_learning,
    add_model,
    add_progress,
    add_resume,
    candidate_settings,
    learning_settings,
    solve_settings,
)
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.cli.planning import CHOOSE, add_device, add_probe, add_traffic, device_of, plan_request, sequences_note
from allocator.contract.errors import InputError
from allocator.pipeline.effort import EFFORTS

if TYPE_CHECKING:
    from allocator.pipeline import FitRequest, GpuTarget
    from allocator.plan import Plan
    from allocator.solve.kv_cache_dtype import KvOption

EXAMPLES = """examples:
  gamma fit ./Qwen3-8B --gpu rtx4080 --max-model-len 8192 --kv-cache-dtype fp8 --out Qwen3-8B-gamma
  vllm serve --config Qwen3-8B-gamma/vllm.yaml
  gamma fit ./Qwen3-8B --gpu rtx4080 --max-model-len 8192 --kv-cache-dtype auto-choose --out Qwen3-8B-gamma
  gamma fit ./Qwen3-8B --budget 5.2GiB --calibration text.jsonl --out Qwen3-8B-gamma
  gamma fit ./Qwen3-8B --average-bits 3.5 --calibration text.jsonl --out Qwen3-8B-3.5bit
  vllm serve Qwen3-8B-gamma"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_budget(parser, required=False, plan=True)
    add_device(parser)
    add_traffic(parser)
    add_probe(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, help="folder for candidates and scores (default: OUT-work)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="measure the assignment and the best uniform plan of the same bytes, and export the better one",
    )
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        help="learn the codes and scales of the assignment anew, as `gamma tune`; kept if it measures better (default: "
        "with --effort best)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a gamma checkpoint at --out")
    add_learning(parser)
    add_resume(parser)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.pipeline import fit
    from allocator.report.documents import export_document
    from allocator.report.tables import export_table, manifest_tables
    from allocator.run.journal import finish_step_on_sigterm

    request = _request(args)
    with finish_step_on_sigterm(), show_progress(args.progress) as progress:
        done = fit(request, progress)
    if args.json:
        document = export_document(done.report)
        document |= {"manifest": done.manifest.payload() | {"digest": done.manifest.digest}}
        document |= {"kv_cache": [_kv_entry(option) for option in done.kv_options]} if done.kv_options else {}
        print_json(document | {"serve": done.serve})
    else:
        print_tables(*manifest_tables(done.manifest), export_table(done.report), *filter(None, [done.price]))
        note = sequences_note(args, done.plan) if done.plan is not None and args.plan is None else ""
        told = [*(_kv_line(option, done.plan) for option in done.kv_options), *filter(None, [note])]
        print_tables(*told, f"serve it: {done.serve}")


def _request(args: argparse.Namespace) -> "FitRequest":
    from allocator.pipeline import FitRequest

    return FitRequest(
        model=args.model,
        revision=args.revision,
        out=args.out,
        work=args.work or args.out.absolute().with_name(args.out.absolute().name + "-work"),
        target=_target(args),
        solving=solve_settings(args),
        fusion=args.fusion,
        probe=args.probe,
        candidates=candidate_settings(args),
        learning=learning_settings(args),
        verified=args.verify,
        tuned=EFFORTS[args.effort].tune if args.tune is None else args.tune,
        overwrite=args.overwrite,
        resume=args.resume,
    )


def _target(args: argparse.Namespace) -> "GpuTarget | Plan | None":
    """The GPU or the plan that the options name, None for a budget in bytes of the checkpoint."""
    from allocator.pipeline import GpuTarget
    from allocator.plan import Plan

    kinds = [args.budget, args.average_bits, args.plan, args.gpu, args.gpu_memory]
    if sum(kind is not None for kind in kinds) != 1:
        raise InputError("give exactly one of --gpu, --gpu-memory, --plan, --budget and --average-bits")
    choose = args.kv_cache_dtype == CHOOSE
    if args.gpu is None and args.gpu_memory is None:
        if choose:
            raise InputError(f"--kv-cache-dtype {CHOOSE} needs --gpu or --gpu-memory, whose memory is shared out")
        return None if args.plan is None else Plan.read(args.plan)
    traffic = plan_request(args, may_choose=True)
    device = device_of(args, traffic.tensor_parallel_size)
    assert device is not None
    return GpuTarget(device, traffic, choose)


def _kv_entry(option: "KvOption") -> dict[str, Any]:
    return {
        "dtype": option.dtype, "kv_loss": option.kv_loss, "total_loss": option.total_loss, "message": option.message
    }  # fmt: skip


def _kv_line(option: "KvOption", plan: "Plan | None") -> str:
    what = f"KV cache {option.dtype}: "
    if option.total_loss is None:
        return what + option.message
    weights = option.total_loss - option.kv_loss
    mark = ", chosen" if plan is not None and option.dtype == plan.request.kv_cache_dtype else ""
    parts = f"{option.kv_loss:.3g} of the KV cache and {weights:.5g} of the weights"
    return f"{what}predicted loss {option.total_loss:.5g}, {parts}{mark}"
