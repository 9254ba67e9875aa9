"""What vLLM makes of the caches of models: `python vllm_caches.py JOBS.json RESULTS.json`, one process for all.

A job is `{"config", "ranks", "stages", "kv_cache_dtype", "block_size", "cases"}`, a case `{"length", "memory"}`; its
result has for each case what `get_kv_cache_configs` says of it, and the bytes of weights and tables. The layers are
those of vLLM's own model classes, on the meta device and on the first of many ranks.

vLLM's CPU build makes the layers of CUDA, with differences that are undone here: its kernels take blocks of 32 tokens
and not of 16, its states of linear attention are in float32 whatever the model says, its layout is another, and its
model runner is the older one, with fewer batches in flight. Multimodal models import torchvision, which it lacks, for
processors that nothing here uses.
"""

import json
import os
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

ANYTHING = """
class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})

__version__ = "0.27.0"
"""


def have_torchvision(folder):
    """A package of that name, where there is none."""
    if find_spec("torchvision") is not None:
        return
    modules = ("", "io", "transforms", "transforms/functional", "transforms/v2", "transforms/v2/functional")
    for module in modules:
        path = Path(folder, "torchvision", module, "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ANYTHING)
    sys.path.insert(0, str(folder))


def vllm_config(job, folder):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    Path(folder, "config.json").write_text(json.dumps(job["config"]))
    made = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        kv_cache_dtype=job["kv_cache_dtype"],
        max_num_batched_tokens=2048,
        language_model_only=True,
    ).create_engine_config()
    made.parallel_config.tensor_parallel_size = job["ranks"]
    made.parallel_config.pipeline_parallel_size = job["stages"]
    made.scheduler_config.async_scheduling = True  # as on CUDA: one batch more in flight
    made.cache_config.block_size = job["block_size"]
    made.cache_config.kv_cache_layout = "LBNHC"
    made.cache_config.mamba_ssm_cache_dtype = "auto"
    if own := MODELS_CONFIG_MAP.get(made.model_config.architecture):
        own.verify_and_update_config(made)
    return made


@contextmanager
def on_first_of(ranks):
    """vLLM's groups as the first of `ranks` has them; nothing is sent."""
    from vllm.distributed import parallel_state

    def group(size):
        inner = SimpleNamespace(size=lambda: size, rank=lambda: 0)
        names = {"rank": 0, "rank_in_group": 0, "local_rank": 0, "is_first_rank": True, "is_last_rank": True}
        names |= {"world_size": size, "ranks": list(range(size)), "unique_name": "here"}
        return SimpleNamespace(**names, device_group=inner, cpu_group=inner)

    others = dict.fromkeys(("_WORLD", "_PP", "_DP", "_EP", "_DCP", "_PCP"), group(1))
    with patch.multiple(parallel_state, _TP=group(ranks), **others):
        yield


@contextmanager
def kernels_of_cuda():
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = staticmethod(lambda kv_cache_spec=None: [MultipleOf(16)])
    with patch.object(CPUAttentionBackend, "get_supported_kernel_block_sizes", sizes):
        yield


@contextmanager
def classes_inspected_here():
    """vLLM asks a process of its own, at the price of its import for each architecture."""
    from vllm.model_executor.models import registry

    def inspect(self):
        return registry._ModelInfo.from_model_cls(self.load_model_cls())

    with patch.object(registry._LazyRegisteredModel, "inspect_model_cls", inspect):
        yield


def layer_specs(made, ranks):
    """Name of a layer -> what it says of its cache, once the size of a block is settled; and the bytes of the model."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(made), on_first_of(ranks), kernels_of_cuda():
        with torch.device("meta"):
            model = initialize_model(made)
        if made.model_config.is_hybrid:
            current_platform.update_block_size_for_backend(made)
        return get_kv_cache_spec(made), loaded_bytes(model)


def loaded_bytes(model):
    """Of all weights, Gemma 4's scalar of each block among them, which is a buffer, and of tables of positions."""
    scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    modules = [module for module in model.modules() if hasattr(module, "cos_sin_cache")]
    return {
        "weights": sum(tensor.nbytes for tensor in [*model.parameters(), *scalars]),
        "tables": sum(module.cos_sin_cache.nbytes for module in modules),
    }


def of_stages(specs, made, stages):
    """The specs that the worker of each pipeline stage has."""
    from vllm.distributed.utils import get_pp_indices
    from vllm.model_executor.models.utils import extract_layer_index

    count = made.model_config.get_total_num_hidden_layers()
    ranges = [range(*get_pp_indices(count, rank, stages)) for rank in range(stages)]
    return [{name: spec for name, spec in specs.items() if extract_layer_index(name) in r} for r in ranges]


def answers(made, workers, case):
    from vllm.v1.core import kv_cache_utils as vllm

    model = made.model_config
    model.max_model_len = model.original_max_model_len = case["length"]
    configs = vllm.get_kv_cache_configs(made, [dict(specs) for specs in workers], [case["memory"]] * len(workers))
    groups = [config.kv_cache_groups for config in configs]
    per_block = [vllm._pool_bytes_per_block(made, here) for here in groups]
    tokens, concurrency = vllm.get_kv_cache_capacity(made, configs[0])
    needed = [vllm._max_memory_usage_bytes_from_groups(made, here) for here in groups]
    model.max_model_len = 1 << 20
    longest = [
        # vLLM keeps the null block back before it asks
        vllm._estimate_max_model_len_from_groups(made, here, case["memory"] - nbytes)
        for here, nbytes in zip(groups, per_block, strict=True)
    ]
    return {
        "bytes_per_block": per_block,
        "num_blocks": configs[0].num_blocks,
        "tokens": tokens,
        "concurrency": concurrency,
        "needed": needed,
        "longest": longest,
    }


def result(job):
    with tempfile.TemporaryDirectory() as folder:
        made = vllm_config(job, folder)
        specs, loaded = layer_specs(made, job["ranks"])
    workers = of_stages(specs, made, job["stages"])
    with patch.object(type(made), "use_v2_model_runner", True):
        return [answers(made, workers, case) | loaded for case in job["cases"]]


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = []
    with tempfile.TemporaryDirectory() as stand_in:
        have_torchvision(stand_in)
        with classes_inspected_here():
            for job in jobs:
                try:
                    results.append(result(job))
                except Exception as error:  # told by the test that wants this one
                    results.append({"error": f"{type(error).__name__}: {error}"})
    Path(sys.argv[2]).write_text(json.dumps(results))
