"""Ask a running sidecar: what `gamma solve`, `plan` and `export` do here, done there.

The address comes from --url or GAMMA_URL, a bearer token from GAMMA_TOKEN: others can read a command line.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.options import add_progress
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.outputs import check_output_file
from allocator.run.progress import Progress, Standing

if TYPE_CHECKING:
    from allocator.sidecar.client import Client
    from allocator.sidecar.schemas import Job

EXAMPLES = """examples:
  gamma remote models --url http://127.0.0.1:8080
  gamma remote plan Qwen3-8B --gpu l4 --max-model-len 8192
  gamma remote allocate Qwen3-8B --budget 5.9GiB --out manifest.json
  gamma remote allocate Qwen3-8B --gpu l4 --max-model-len 8192
  gamma remote checkpoint sha256:...
  gamma remote jobs
  gamma remote cancel sha256:... | gamma remote delete-job sha256:..."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="action", metavar="models|gpus|plan|allocate|sweep|checkpoint|jobs|cancel|delete-job", required=True
    )
    made = {
        name: verbs.add_parser(name, help=text)
        for name, text in {
            "models": "what has scores",
            "gpus": "the GPUs that plans know",
            "plan": "what a GPU leaves for the weights",
            "allocate": "the best assignment for a budget or a GPU",
            "sweep": "size against predicted loss",
            "checkpoint": "make the checkpoint of a manifest, and wait for it",
            "jobs": "the checkpoints that were asked for, and how they stand",
            "cancel": "end a job that waits or is being made",
            "delete-job": "forget a job that has ended; its checkpoint stays",
        }.items()
    }
    for name in ("plan", "allocate", "sweep"):
        made[name].add_argument("model", metavar="MODEL", help="name in the store, or digest of a model or of scores")
    for name in ("plan", "allocate"):
        _add_hardware(made[name])
    made["allocate"].add_argument("--budget", help="bytes of all tensors, e.g. 5.9GiB, or 3.25bits")
    made["allocate"].add_argument("--average-bits", type=float)
    made["allocate"].add_argument("--fusion", choices=["auto", "free", "tied"], default="auto")
    made["allocate"].add_argument("--out", type=Path, metavar="MANIFEST", help="write the manifest to this file")
    made["sweep"].add_argument("--points", type=int, default=17)
    made["checkpoint"].add_argument("manifest", metavar="DIGEST", help="of an allocation's manifest")
    for name in ("cancel", "delete-job"):
        made[name].add_argument("job", metavar="DIGEST", help="id of the job")
    add_progress(made["checkpoint"])
    for verb in made.values():
        verb.add_argument("--url", default=os.environ.get("GAMMA_URL", "http://127.0.0.1:8080"))
        verb.add_argument("--json", action="store_true", help="print the answer as JSON")


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME")
    parser.add_argument("--gpu-memory", metavar="SIZE")
    parser.add_argument("--max-model-len", type=int, metavar="N")
    parser.add_argument("--max-num-seqs", type=int, metavar="N")
    parser.add_argument("--kv-cache-dtype", metavar="DTYPE")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N")
    parser.add_argument("--gpu-memory-utilization", type=float, metavar="PART")


def run(args: argparse.Namespace) -> int | None:
    from allocator.sidecar.client import Client

    client = Client(args.url, os.environ.get("GAMMA_TOKEN"))
    return _ACTIONS[args.action](args, client)


def _models(args: argparse.Namespace, client: "Client") -> None:
    from allocator.report.tables import new_table

    models = client.models()
    if args.json:
        return print_json([m.model_dump(mode="json") for m in models])
    table = new_table(client.url)
    for column in ("model", "scores", "method", "modules", "feasible GiB"):
        table.add_column(column, no_wrap=True)
    for m in models:
        low, high = (size / 2**30 for size in m.feasible_bytes)
        table.add_row(m.name, m.scores_digest[7:19], m.method, str(m.modules), f"{low:.2f}-{high:.2f}")
    print_tables(table)


def _gpus(args: argparse.Namespace, client: "Client") -> None:
    gpus = client.gpus()
    if args.json:
        return print_json([g.model_dump(mode="json") for g in gpus])
    print_tables(*(f"{g.id:28} {g.memory_bytes / 2**30:7.1f} GiB  {g.name}" for g in gpus))


def _plan(args: argparse.Namespace, client: "Client") -> int:
    plan = client.plan(model=args.model, **_hardware(args))
    if args.json:
        print_json(plan.payload() | {"digest": plan.digest})
    else:
        print_tables(
            f"{plan.model} on {plan.device.name}: {plan.verdict.message}",
            *(f"  {line.name:22} {line.nbytes:>18,} bytes  {line.note}" for line in plan.lines),
        )
    return 0 if plan.verdict.fits else InfeasibleBudgetError.exit_code


def _allocate(args: argparse.Namespace, client: "Client") -> None:
    if args.out is not None:
        check_output_file(args.out)
    hardware = _hardware(args)
    fields: dict[str, Any] = {"model": args.model, "fusion": args.fusion}
    fields |= {k: v for k, v in {"budget": args.budget, "average_bits": args.average_bits}.items() if v is not None}
    if hardware:
        fields["plan"] = hardware
    allocation = client.allocate(manifest=args.out is not None, **fields)
    if args.out is not None:
        client.manifest_of(allocation).write(args.out)
        allocation = allocation.model_copy(update={"manifest": None})
    if args.json:
        return print_json(allocation.model_dump(mode="json", exclude_none=True))
    print_tables(
        f"{allocation.model}: {allocation.average_bits:.3f} bits, {allocation.tensor_bytes:,} bytes of tensors",
        f"predicted loss {allocation.predicted_loss:.6g} {allocation.unit}",
        f"allocation {allocation.id}",
        f"manifest   {allocation.manifest_digest}",
    )


def _sweep(args: argparse.Namespace, client: "Client") -> None:
    result = client.sweep(model=args.model, points=args.points)
    if args.json:
        return print_json(result.model_dump(mode="json", exclude_none=True))
    rows = (f"{p.tensor_bytes:>16,} {p.average_bits:>8.3f} {p.predicted_loss:>12.5g}" for p in result.points)
    print_tables(f"{'bytes':>16} {'bits':>8} {'loss':>12}  in {result.unit}", *rows)
    if result.measured:
        from allocator.report.recorded import Recorded, recorded_table

        print_tables(*recorded_table([Recorded(**point.model_dump()) for point in result.measured]))


def _checkpoint(args: argparse.Namespace, client: "Client") -> None:
    job = client.make_checkpoint(args.manifest)
    print(f"job {job.id}", file=sys.stderr)
    with show_progress(args.progress) as progress:
        done = client.wait(job, lambda now: _tell(now, progress))
    if args.json:
        return print_json(done.model_dump(mode="json", exclude_none=True))
    print_tables(f"{done.checkpoint} on the machine of the service, {done.tensor_bytes:,} bytes of tensors")


def _jobs(args: argparse.Namespace, client: "Client") -> None:
    jobs = list(client.jobs())
    if args.json:
        return print_json([job.model_dump(mode="json", exclude_none=True) for job in jobs])
    print_tables(*(f"{job.id}  {job.state:9} {job.updated}  {job.checkpoint or job.error or job.step}" for job in jobs))


def _cancel(args: argparse.Namespace, client: "Client") -> None:
    job = client.cancel(args.job)
    if args.json:
        return print_json(job.model_dump(mode="json", exclude_none=True))
    print_tables(f"job {job.id}: {job.state}" + (", asked to end" if job.state == "running" else ""))


def _delete_job(args: argparse.Namespace, client: "Client") -> None:
    client.delete_job(args.job)
    if args.json:
        return print_json({"id": args.job, "deleted": True})
    print_tables(f"job {args.job}: deleted")


def _tell(job: "Job", progress: Progress) -> None:
    """A job shows what its process says; before that, that it waits."""
    if job.standing is not None:
        progress.relay(job.standing)
    else:
        progress.relay(Standing(step=job.state, number=1, steps=1, unit="", done=0, total=1))


def _hardware(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "gpu", "gpu_memory", "max_model_len", "max_num_seqs", "kv_cache_dtype", "tensor_parallel_size",
        "gpu_memory_utilization",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and not given.keys() & {"gpu", "gpu_memory"}:
        raise InputError(f"--{next(iter(given)).replace('_', '-')} needs --gpu or --gpu-memory")
    return given


_ACTIONS: dict[str, Callable[[argparse.Namespace, "Client"], int | None]] = {
    "models": _models, "gpus": _gpus, "plan": _plan, "allocate": _allocate, "sweep": _sweep, "checkpoint": _checkpoint,
    "jobs": _jobs, "cancel": _cancel, "delete-job": _delete_job,
}  # fmt: skip
