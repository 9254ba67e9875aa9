"""The real `auto-round` at one uniform width: writes the weights that it has chosen, as floating point.

    python benchmarks/quantizers/autoround.py MODEL --tokens tokens.pt --bits 2 --out weights.safetensors

in an environment of its own that has `auto-round` 0.16.1. bench.py calls it so where GAMMA_AUTOROUND_PYTHON names
that environment's Python. Its defaults but for the text: 200 iterations, batches of 8, its own learning rates.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [sequences, length], by torch.save")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.load(args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(8)]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=False,
        data_type="int",
        act_bits=16,
        dataset=batches,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        scale_dtype=torch.bfloat16,
    )
    begun = time.process_time()
    quantized, _ = rounding.quantize()
    seconds = time.process_time() - begun
    weights = {n: p.detach().float().contiguous() for n, p in quantized.named_parameters() if ".layers." in n}
    save_file(weights, args.out)
    print(json.dumps({"cpu_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
