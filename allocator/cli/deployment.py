"""Options of `gamma prepare` and of `gamma sidecar --node`: one set, each also taken from the environment."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.cli.planning import add_lora, lora_request
from allocator.contract.errors import InputError

if TYPE_CHECKING:  # imported late, to keep `gamma --help` fast
    from allocator.sidecar.settings import PrepareSettings

__all__ = ["add_deployment", "add_store", "from_environment", "prepare_settings"]


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="DIR_OR_URL",
        help="folder or object storage (s3://, gs://) of scores and banks, filled by `gamma store add`",
    )


def add_deployment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to prepare")
    group.add_argument("--out", type=Path, metavar="DIR", help="gets checkpoint/, vllm.yaml, plan.json, manifest.json")
    group.add_argument("--gpu", default="auto", metavar="NAME", help="a GPU of `gamma plan`, or auto: the visible one")
    group.add_argument(
        "--gpu-memory",
        metavar="BYTES",
        help="memory of one NVIDIA GPU, e.g. 24GiB, also where none is; beats what is read",
    )
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    group.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N", help="stages, e.g. one a node")
    group.add_argument("--max-model-len", type=int, metavar="N", help="default: what the model allows")
    group.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help="sequences of that length at once (default: vLLM's, of which one fits at that length)",
    )
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="default: what vLLM takes on the card")
    group.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "fp8", "auto-choose"],
        default="auto",
        help="auto-choose: what costs least together with the weights (`gamma kv` measured it before `store add`)",
    )
    group.add_argument("--gpu-memory-utilization", type=float, metavar="F", help="default: vLLM's")
    group.add_argument("--enable-expert-parallel", action="store_true", help="deal whole experts out to the ranks")
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument(
        "--budget",
        default="auto",
        metavar="auto|5.9GiB|3.25bits|sha256:MANIFEST",
        help="auto: what the GPU leaves for weights; else bytes of all tensors, average bits, or a stored manifest",
    )
    group.add_argument(
        "--fusion",
        choices=["auto", "free", "tied"],
        default="auto",
        help="tied: one width for the modules that vLLM fuses into one layer; auto: tied on a GPU that is named or "
        "seen, else free",
    )
    group.add_argument("--served-model-name", metavar="NAME", help="default: the model's name in the store")
    group.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="what `vllm serve` will get besides vllm.yaml, to be refused if it contradicts the plan; may be repeated",
    )
    add_lora(parser)


def from_environment(parser: argparse.ArgumentParser) -> None:
    """Let every long option of `parser` default to the environment variable GAMMA_<OPTION>; flags given win."""
    for action in parser._actions:
        longest = max(action.option_strings, key=len, default="")
        name = "GAMMA_" + (longest.removeprefix("--") or action.dest).replace("-", "_").upper()
        value = os.environ.get(name)
        if value is None or action.dest == "help":
            continue
        if name == "GAMMA_PORT" and value.startswith("tcp://"):
            continue  # Kubernetes sets it so in pods beside a Service named gamma
        if action.nargs == 0:
            if value.lower() not in ("1", "true", "yes", "0", "false", "no", ""):
                parser.error(f"{name}={value!r}: allowed are true and false")
            action.default = value.lower() in ("1", "true", "yes")
        elif isinstance(action, argparse._AppendAction):
            parts = [part for part in value.split(",") if part]
            action.default = [action.type(p) if callable(action.type) else p for p in parts]
        else:
            if action.choices is not None and value not in action.choices:
                parser.error(f"{name}={value!r}: choose from {', '.join(map(str, action.choices))}")
            action.default = value  # argparse converts a default that is text
        action.required = False


def prepare_settings(args: argparse.Namespace) -> "PrepareSettings":
    """Raises InputError for what is missing or out of range."""
    from pydantic import ValidationError

    from allocator.contract.amounts import parse_budget
    from allocator.contract.documents import explain
    from allocator.sidecar.settings import PrepareSettings

    for name in ("model", "store", "out"):
        if not getattr(args, name):
            what = "MODEL" if name == "model" else f"--{name}"
            raise InputError(f"{what} is missing; give it, or set GAMMA_{name.upper()}")
    try:
        return PrepareSettings(
            model=args.model,
            gpu=args.gpu,
            gpu_memory_bytes=None if args.gpu_memory is None else parse_budget(args.gpu_memory),
            tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_dtype=args.kv_cache_dtype,
            gpu_memory_utilization=args.gpu_memory_utilization,
            expert_parallel=args.enable_expert_parallel,
            enforce_eager=args.enforce_eager,
            lora=lora_request(args),
            budget=args.budget,
            fusion=args.fusion,
            served_model_name=args.served_model_name,
            vllm_args=args.vllm_arg,
        )
    except ValidationError as error:
        raise InputError(explain(error)) from None
