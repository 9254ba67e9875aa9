"""Runs engines for the tests, one after the other in one process: `python engine.py JOBS.json RESULTS.json`.

A job is `{"name", "model", "kernel", "options", "environment", "steps"}`; its result is `{"steps": [...]}` or
`{"error": text}`. A job without a kernel is answered by Hugging Face transformers. Importing vLLM costs 10 s and more,
which are paid once.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import torch
from vllm import LLM, ModelRegistry, PoolingParams, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


class Transformers:
    """The answers to compare with."""

    def __init__(self, model):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def generate(self, prompts, tokens):
        answers = []
        for prompt in prompts:
            output = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            answers.append(output[0, len(prompt) :].tolist())
        return answers

    @torch.inference_mode()
    def score(self, prompt, save):
        return _scores(torch.log_softmax(self.model(torch.tensor([prompt])).logits[0, :-1], -1), prompt, save)


class Vllm:
    def __init__(self, model, **options):
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "max_logprobs": -1,
            "distributed_executor_backend": "uni",
            "enable_prefix_caching": False,
        }
        self.engine = LLM(model, **(defaults | options))

    def generate(self, prompts, tokens, lora=None):
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        adapter = LoRARequest("adapter", 1, lora) if lora else None
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.engine.generate(inputs, sampling, use_tqdm=False, lora_request=adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def singly(self, prompts, tokens):
        return [self.generate([prompt], tokens)[0] for prompt in prompts]

    def score(self, prompt, save):
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
        output = self.engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        rows = [[entry[token].logprob for token in range(len(entry))] for entry in output.prompt_logprobs[1:]]
        return _scores(torch.tensor(rows), prompt, save)

    def embed(self, prompts):
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs.embedding) for output in self.engine.embed(inputs, use_tqdm=False)]

    def classify(self, prompts):
        """The scores as they are, no probabilities of them."""
        inputs, as_they_are = [{"prompt_token_ids": prompt} for prompt in prompts], PoolingParams(use_activation=False)
        outputs = self.engine.classify(inputs, pooling_params=as_they_are, use_tqdm=False)
        return [list(output.outputs.probs) for output in outputs]

    def accepted(self):
        """How many drafted tokens were right; with `disable_log_stats=False`."""
        counts = {metric.name: metric.value for metric in self.engine.get_metrics() if hasattr(metric, "value")}
        return counts["vllm:spec_decode_num_accepted_tokens"]

    def zero(self):
        self.engine.collective_rpc(_zero)

    def reload(self):
        # The engine that was started without weights takes them from the checkpoint now.
        overrides = {"load_config": {"load_format": "auto"}}
        self.engine.collective_rpc("update_config", kwargs={"overrides": overrides})
        self.engine.collective_rpc("reload_weights")

    def sleep(self, level):
        """Give the GPU's memory back and take it again. At level 1 weights wait in the host's, at 2 nowhere."""
        self.engine.sleep(level=level)
        if level == 2:
            self.engine.wake_up(tags=["weights"])
            self.engine.collective_rpc("reload_weights")
            self.engine.wake_up(tags=["kv_cache"])
        else:
            self.engine.wake_up()

    def parameters(self):
        return self.engine.collective_rpc(_parameters)[0]

    def adapters(self):
        return self.engine.collective_rpc(_adapters)

    def resident(self):
        return self.engine.collective_rpc(_resident)


def _zero(worker):
    for parameter in worker.model_runner.model.parameters():
        parameter.data.zero_()


def _parameters(worker):
    """Name -> (dtype, shape, sum) of the parameters that the plugin makes."""
    named = worker.model_runner.model.named_parameters()
    return {
        name: [str(p.dtype), list(p.shape), float(p.detach().double().sum())]
        for name, p in named
        if "gamma_" in name or "weight_packed" in name
    }


def _resident(worker):
    """Bytes of all parameters of this rank, each counted once.

    vLLM's CPU backend moves the 16-bit weights of linear layers into memory of oneDNN and leaves an empty
    parameter: those are counted by the layer's sizes on this rank. Gemma 4's scalar of each block is a buffer.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    model = worker.model_runner.model
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    total += sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.endswith("layer_scalar"))
    for layer in model.modules():
        if not isinstance(layer, LinearBase) or not isinstance(layer.quant_method, UnquantizedLinearMethod):
            continue
        if not layer.weight.numel():
            rows = getattr(layer, "output_size_per_partition", layer.output_size)
            columns = getattr(layer, "input_size_per_partition", layer.input_size)
            total += rows * columns * layer.weight.element_size()
    return total


def _adapters(worker):
    """Bytes of all buffers for LoRA adapters on this rank, each counted once."""
    from vllm.lora.layers import BaseLayerWithLoRA

    buffers = {}
    for layer in worker.model_runner.model.modules():
        if isinstance(layer, BaseLayerWithLoRA):
            for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
                for tensor in stacked if isinstance(stacked, tuple) else [stacked]:
                    buffers[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(buffers.values())


def _scores(logprobs, prompt, save):
    """Perplexity of the prompt; the log-probabilities `[len(prompt) - 1, vocabulary]` go to the file `save`."""
    torch.save(logprobs, save)
    chosen = logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    return math.exp(-float(chosen.mean()))


_OF_TRANSFORMERS = ("TransformersForSequenceClassification", "TransformersEmbeddingModel")


def _inspect_here(model, options):
    """vLLM inspects a model class in a process of its own, which costs 10 s for each; this one has all it needs."""
    config = json.loads((Path(model) / "config.json").read_text()) | options.get("hf_overrides", {})
    (name,) = config["architectures"]
    names = [name]
    if name not in ModelRegistry.models:  # vLLM makes it of the class that generates, and looks at what it might have
        names = [re.sub("(ForSequenceClassification|Model)$", "ForCausalLM", name), *_OF_TRANSFORMERS]
    for name in names:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def run(job):
    engine = None
    try:
        if "kernel" in job:
            _inspect_here(job["model"], job.get("options", {}))
            os.environ |= {"GAMMA_KERNEL": job["kernel"], **job.get("environment", {})}
            engine = Vllm(job["model"], **job.get("options", {}))
        else:
            engine = Transformers(job["model"])
        return {"steps": [getattr(engine, verb)(**arguments) for verb, arguments in job["steps"]]}
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        del engine
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    results = {}
    for task in json.loads(Path(sys.argv[1]).read_text()):
        started = time.perf_counter()
        results[task["name"]] = run(task)
        print(f"{task['name']}: {time.perf_counter() - started:.1f} s", flush=True)
        Path(sys.argv[2]).write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads do not always end
