"""Starts vLLM once with dummy weights and writes what it used: `python -m gamma_vllm.probe JOB.json RESULT.json`.

The job is `{"model": folder, "arguments": {vLLM's engine arguments}}`. The result holds one entry a rank
(`gamma_vllm.probe_worker`), vLLM's version, the device and what vLLM resolved the arguments to. Run as a program by
`gamma probe`, which keeps vLLM out of its own process.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["probe"]

_LONGEST_PROMPT = 4096


def probe(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start an engine for `model`, let it answer one full batch, and read every worker's memory."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    arguments = {"max_num_batched_tokens": _served_tokens(arguments)} | arguments
    started = time.perf_counter()
    engine = LLM(
        model,
        load_format="dummy",
        worker_extension_cls="gamma_vllm.probe_worker.ProbeWorker",
        skip_tokenizer_init=True,
        **arguments,
    )
    config = engine.llm_engine.vllm_config
    longest, batched = config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens
    engine.collective_rpc("gamma_probe_start")
    length = max(1, min(longest - 1, batched, _LONGEST_PROMPT))
    prompts = [{"prompt_token_ids": [1] * length} for _ in range(max(1, min(batched // length, 64)))]
    engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
    ranks = engine.collective_rpc("gamma_probe")
    on_cuda = current_platform.is_cuda_alike()
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device_type": current_platform.device_type,
        "device": current_platform.get_device_name() if on_cuda else _cpu_name(),
        "max_model_len": int(longest),
        "max_num_batched_tokens": int(batched),
        "max_num_seqs": int(config.scheduler_config.max_num_seqs),
        "ranks": ranks,
        "seconds": time.perf_counter() - started,
    }


def _served_tokens(arguments: dict[str, Any]) -> int:
    """What `vllm serve` takes for max_num_batched_tokens; engines inside a program get more by default."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    return int(EngineArgs.get_batch_defaults(ranks)[0][UsageContext.OPENAI_API_SERVER])


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(probe(job["model"], job["arguments"])))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's threads do not always end


if __name__ == "__main__":
    main()
