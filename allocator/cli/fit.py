"""From a model to a checkpoint that fits a budget: learn, solve and export in one step.

The work folder keeps candidates and scores, so that the same command with another budget only solves and exports.
"""

import argparse
import shlex
from dataclasses import replace
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
from allocator.cli.planning import add_device, add_probe, add_traffic, device_of, plan_request, probe_of
from allocator.contract.errors import InputError
from allocator.contract.outputs import check_output_folder

if TYPE_CHECKING:
    from allocator.contract.manifest import Manifest
    from allocator.plan import Plan
    from allocator.run.progress import Progress
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
    parser.add_argument("--overwrite", action="store_true", help="replace a gamma checkpoint at --out")
    add_learning(parser)
    add_resume(parser)
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.pipeline.pipeline import fit, resolve_model
    from allocator.report.documents import export_document
    from allocator.report.tables import export_table, manifest_tables
    from allocator.run.journal import finish_step_on_sigterm

    candidates, learning = candidate_settings(args), learning_settings(args)
    work = args.work or args.out.absolute().with_name(args.out.absolute().name + "-work")
    check_output_folder(args.out, replaced=True)
    check_output_folder(work, "--work")
    joint = args.kv_cache_dtype == "auto-choose"
    if joint:
        args.kv_cache_dtype = "auto"
    plan, options = _plan(args), []
    with finish_step_on_sigterm(), show_progress(args.progress) as progress:
        model = resolve_model(args.model, args.revision)
        if joint:
            options = _choose_kv_cache(args, model, work, progress)
            plan = _plan(args)
        manifest, report = fit(
            model, work, args.out, solve_settings(args, plan), candidates, learning,
            overwrite=args.overwrite, progress=progress, resume=args.resume, plan=plan, verified=args.verify,
        )  # fmt: skip
    serve = f"vllm serve {args.out}" if plan is None else _write_serving(args, plan)
    if args.json:
        document = export_document(report) | {"manifest": manifest.payload() | {"digest": manifest.digest}}
        document |= {"kv_cache": [_kv_entry(option) for option in options]} if options else {}
        print_json(document | {"serve": serve})
    else:
        print_tables(*manifest_tables(manifest), export_table(report), *_price(args, manifest, plan, work))
        print_tables(*(_kv_line(option, args.kv_cache_dtype) for option in options), f"serve it: {serve}")


def _price(args: argparse.Namespace, manifest: "Manifest", plan: "Plan | None", work: Path) -> list[str]:
    """What tied fusion costs, where the plan chose it."""
    from allocator.contract.scores import Scores
    from allocator.plan.fusion import fusion_price
    from allocator.solve import solve_resident

    settings = solve_settings(args, plan)
    if plan is None or settings.fusion == "free" or manifest.proof is None:
        return []
    scores, free = Scores.read(work / "scores.json"), replace(settings, fusion="free")

    def solved() -> "Manifest":
        return solve_resident(scores, free, plan.residency, plan.weight_budget_bytes, manifest.budget.requested)

    return [fusion_price(manifest, solved)]


def _choose_kv_cache(args: argparse.Namespace, model: Path, work: Path, progress: "Progress") -> "list[KvOption]":
    """Learn, measure what the KV cache costs, and set --kv-cache-dtype to that of the least total loss."""
    from allocator.pipeline.measure import kv_scores_of
    from allocator.pipeline.pipeline import learn
    from allocator.solve.kv_cache_dtype import choose_kv_dtype

    candidates = candidate_settings(args)

    def plan_for(dtype: str) -> "Plan":
        plan = _plan(argparse.Namespace(**{**vars(args), "kv_cache_dtype": dtype}))
        if plan is None or args.plan is not None:
            raise InputError("--kv-cache-dtype auto-choose needs --gpu or --gpu-memory, whose memory is shared out")
        return plan

    settings = solve_settings(args, plan_for("auto"))
    scores = learn(model, work, candidates, learning_settings(args), progress, args.resume).scores
    measured = kv_scores_of(model, work, scores, candidates, progress)
    chosen, options = choose_kv_dtype(scores, measured, settings, plan_for)
    args.kv_cache_dtype = chosen.dtype
    return options


def _kv_entry(option: "KvOption") -> "dict[str, Any]":
    return {
        "dtype": option.dtype, "kv_loss": option.kv_loss, "total_loss": option.total_loss, "message": option.message
    }  # fmt: skip


def _kv_line(option: "KvOption", chosen: str) -> str:
    what = f"KV cache {option.dtype}: "
    if option.total_loss is None:
        return what + option.message
    weights = option.total_loss - option.kv_loss
    mark = ", chosen" if option.dtype == chosen else ""
    parts = f"{option.kv_loss:.3g} of the KV cache and {weights:.5g} of the weights"
    return f"{what}predicted loss {option.total_loss:.5g}, {parts}{mark}"


def _plan(args: argparse.Namespace) -> "Plan | None":
    """The plan that the options ask for, None for a budget in bytes of the checkpoint."""
    from allocator.plan import Plan
    from allocator.plan.plan import make_plan
    from allocator.plan.weights import read_model

    kinds = [args.budget, args.average_bits, args.plan, args.gpu, args.gpu_memory]
    if sum(kind is not None for kind in kinds) != 1:
        raise InputError("give exactly one of --gpu, --gpu-memory, --plan, --budget and --average-bits")
    if args.plan is not None:
        return Plan.read(args.plan)
    if args.gpu is None and args.gpu_memory is None:
        return None
    request = plan_request(args)
    device = device_of(args, request.tensor_parallel_size)
    assert device is not None
    model = read_model(args.model, args.revision)
    return make_plan(
        model.shape, device, request, model=model.name, group_size=args.group_size, symmetric=args.symmetric,
        probe=probe_of(args, model.shape, device, request),
    )  # fmt: skip


def _write_serving(args: argparse.Namespace, plan: "Plan") -> str:
    """The plan of the finished checkpoint and `vllm.yaml` beside it; returns the command that serves it."""
    from allocator.plan.gpus import device_again
    from allocator.plan.plan import make_plan
    from allocator.plan.vllm_arguments import vllm_arguments, write_vllm_config
    from allocator.plan.weights import read_model

    checkpoint, device = args.out, device_again(plan.device)
    model = read_model(str(checkpoint))
    probe = probe_of(args, model.shape, device, plan.request)
    final = make_plan(model.shape, device, plan.request, model=plan.model, formats=model.formats, probe=probe)
    final.write(checkpoint / "plan.json")
    write_vllm_config(final, checkpoint.absolute())
    return shlex.join(vllm_arguments(final, str(checkpoint)))
