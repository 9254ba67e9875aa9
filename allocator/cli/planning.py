"""Options of the verbs that plan for a GPU, and what they mean."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.contract.errors import InputError

if TYPE_CHECKING:
    from allocator.model.shape import ModelShape
    from allocator.plan import Device, Gpu, Plan, PlanRequest
    from allocator.plan.schema import LoraRequest

__all__ = [
    "CHOOSE",
    "add_device",
    "add_lora",
    "add_probe",
    "add_traffic",
    "catalogue_of",
    "device_of",
    "lora_request",
    "plan_request",
    "probe_of",
    "sequences_note",
]


CHOOSE = "auto-choose"
"""The value of --kv-cache-dtype that leaves the choice to the solver."""


def add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPU")
    group.add_argument(
        "--gpu", metavar="NAME", help="a card (rtx4090, h100, l4, a100-40gb:3g.20gb), or auto: the one here"
    )
    group.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of a card without a name, as its driver has it: 24GiB"
    )
    group.add_argument("--gpu-catalogue", type=Path, metavar="FILE", help="cards of your own (`gamma schema gpus`)")


def add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="a record of `gamma probe`, or none (default: the record of this GPU and vLLM in the user's cache)",
    )


def probe_of(args: argparse.Namespace, shape: "ModelShape", device: "Device", request: "PlanRequest") -> dict[str, int]:
    """The lines of a plan that a record of `gamma probe` replaces by what was measured."""
    from allocator.plan.probe_records import probe_lines

    return probe_lines(args.probe, shape, device, request)


def add_traffic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("traffic and vLLM, named as in `vllm serve`")
    group.add_argument("--max-model-len", metavar="N", help="longest sequence (default: the model's)")
    group.add_argument(
        "--max-num-seqs",
        metavar="N",
        help="sequences of that length at once, which is also the most that vLLM will be told to run (default 1)",
    )
    group.add_argument("--max-num-batched-tokens", metavar="N", help="default: what vLLM takes on the card")
    group.add_argument(
        "--kv-cache-dtype",
        metavar="DTYPE",
        default="auto",
        help="auto (default), fp8, ...; auto-choose in fit and prepare",
    )
    group.add_argument("--tensor-parallel-size", metavar="N", default="1")
    group.add_argument("--pipeline-parallel-size", metavar="N", default="1")
    group.add_argument("--enable-expert-parallel", action="store_true", help="deal whole experts out to the ranks")
    group.add_argument("--gpu-memory-utilization", metavar="PART", default="0.92", help="default 0.92, as vLLM has it")
    group.add_argument("--block-size", metavar="N", default="16")
    group.add_argument(
        "--kernel",
        choices=["humming", "native", "ark", "ark-amx", "torch"],
        default="humming",
        help="default humming (CUDA); ark-amx is ark on CPUs with AMX",
    )
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    add_lora(parser)


def add_lora(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA adapters, named as in `vllm serve`")
    group.add_argument("--enable-lora", action="store_true", help="count what vLLM sets aside for adapters")
    group.add_argument("--max-loras", type=int, metavar="N", help="adapters in one batch (default 1)")
    group.add_argument("--max-lora-rank", type=int, metavar="N", help="their largest rank (default 16)")
    group.add_argument(
        "--lora-target-modules", metavar="NAME,NAME", help="modules that have adapters, e.g. qkv_proj,o_proj (all)"
    )


def lora_request(args: argparse.Namespace) -> "LoraRequest | None":
    """Raises InputError for options without --enable-lora, and for a rank that vLLM does not have."""
    from allocator.plan.schema import LORA_RANKS, LoraRequest

    given = {name: getattr(args, name) for name in ("max_loras", "max_lora_rank") if getattr(args, name) is not None}
    if args.lora_target_modules is not None:
        given["lora_target_modules"] = [name for name in args.lora_target_modules.split(",") if name]
    if not args.enable_lora:
        if given:
            raise InputError(f"--{next(iter(given)).replace('_', '-')} needs --enable-lora")
        return None
    if given.get("max_lora_rank", 1) not in LORA_RANKS:
        allowed = ", ".join(map(str, LORA_RANKS))
        raise InputError(f"--max-lora-rank {given['max_lora_rank']} is none of vLLM's; allowed are {allowed}")
    if given.get("max_loras", 1) < 1:
        raise InputError(f"--max-loras {given['max_loras']}: give at least 1")
    if not given.get("lora_target_modules", True):
        raise InputError("--lora-target-modules is empty; name modules such as qkv_proj,o_proj")
    return LoraRequest(**{name.removeprefix("lora_"): value for name, value in given.items()})


def catalogue_of(args: argparse.Namespace) -> "list[Gpu]":
    from allocator.plan import load_catalogue

    return load_catalogue(args.gpu_catalogue)


def device_of(args: argparse.Namespace, ranks: int) -> "Device | None":
    """The device of each of `ranks` that the options name, None if they name none. Raises InputError."""
    from allocator.contract.amounts import parse_budget
    from allocator.plan import find_gpu, memory_device

    if args.gpu is not None and args.gpu_memory is not None:
        raise InputError("give one of --gpu and --gpu-memory")
    if args.gpu_memory is not None:
        try:
            return memory_device(parse_budget(args.gpu_memory))
        except InputError as error:
            raise InputError(f"--gpu-memory: {error}".replace("budget ", "", 1)) from None
    if args.gpu == "auto":
        from allocator.plan.visible_gpus import device_of_visible, read_devices

        visible = read_devices()
        if not visible:
            raise InputError(
                "--gpu auto: no NVIDIA GPU is visible here; name one (--gpu rtx4090) or give --gpu-memory 24GiB"
            )
        return device_of_visible(visible, ranks)
    return None if args.gpu is None else find_gpu(args.gpu, catalogue_of(args))


def plan_request(args: argparse.Namespace, may_choose: bool = False) -> "PlanRequest":
    """Raises InputError naming the option, what was given and what is allowed.

    `may_choose`: --kv-cache-dtype auto-choose is one of these, and the request has the model's own dtype.
    """
    from pydantic import ValidationError

    from allocator.plan import PlanRequest
    from allocator.plan.schema import KV_CACHE_DTYPES

    dtype = "auto" if may_choose and args.kv_cache_dtype == CHOOSE else args.kv_cache_dtype
    if dtype not in KV_CACHE_DTYPES:
        raise InputError(f"--kv-cache-dtype {dtype!r} is not known; allowed are {', '.join(KV_CACHE_DTYPES)}")
    given: dict[str, Any] = {
        name: _count("--" + name.replace("_", "-"), getattr(args, name))
        for name in (
            "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size",
            "block_size",
        )
        if getattr(args, name) is not None
    }  # fmt: skip
    given |= {
        "kv_cache_dtype": dtype,
        "expert_parallel": args.enable_expert_parallel,
        "gpu_memory_utilization": _share("--gpu-memory-utilization", args.gpu_memory_utilization),
        "enforce_eager": args.enforce_eager,
        "kernel": args.kernel,
        "lora": lora_request(args),
    }
    try:
        return PlanRequest(**given)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        option = "--" + str(item["loc"][0]).replace("_", "-")
        raise InputError(f"{option} {item['input']}: {item['msg'].lower()}") from None


def sequences_note(args: argparse.Namespace, plan: "Plan") -> str:
    """What to tell of a plan for one sequence that nobody asked for by number; empty where somebody did."""
    from allocator.plan.schema import default_num_seqs

    if args.max_num_seqs is not None:
        return ""
    usual = default_num_seqs(plan.device.cuda_bytes, plan.device.name)
    return (
        "planned for one sequence at a time, as --max-num-seqs was not given: vllm.yaml and the commands say so to "
        f"vLLM, which would run up to {usual}. Each further one takes from the weights what its KV cache needs"
    )


def _count(option: str, text: str) -> int:
    units = {"": 1, "k": 1000, "K": 1024}
    match = re.fullmatch(r"([0-9][0-9_]{0,11})([kK]?)", text.strip())
    if match is None:
        raise InputError(f"{option} {text!r} is no whole number; give one such as 8192 or 16K (16384)")
    return int(match[1]) * units[match[2]]


def _share(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise InputError(f"{option} {text!r}: give a number above 0 and at most 1, such as 0.92")
    return value
