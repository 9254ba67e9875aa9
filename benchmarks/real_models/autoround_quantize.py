"""Quantizes a model with AutoRound's own program, in a process of its own.

    python autoround_quantize.py MODEL TOKENS.safetensors OUT settings.json

TOKENS: token_ids, int64 `[sequences, length]`, the calibration text. settings: widths (one: that scheme; several: the
options of AutoScheme), average_bits, group_size, iters. Writes OUT, in AutoRound's own format.

AutoScheme takes text from a file only: there the sequences are decoded, encoded again by it, and cut a little shorter.
"""

import json
import os
import sys
from pathlib import Path

os.environ["AR_ALLOW_W8_ASYM"] = "1"

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoTokenizer

_MARGIN = 16
"""Tokens that a sequence may lose when it is encoded again; AutoRound drops those that are too short."""


def main(model: str, tokens_file: str, out: str, settings_file: str) -> None:
    settings = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    tokens = load_file(tokens_file)["token_ids"]
    amount = {"nsamples": len(tokens), "seqlen": tokens.shape[1]}
    form = {"group_size": settings["group_size"], "sym": False, "data_type": "int", "act_bits": 16}
    options = [QuantizationScheme(bits=bits, **form) for bits in settings["widths"]]
    if len(options) == 1:
        scheme = options[0]
        text = [{"input_ids": rows[None], "attention_mask": torch.ones_like(rows[None])} for rows in tokens]
    else:
        text = str(Path(tokens_file).with_name("text.json"))
        tokenizer = AutoTokenizer.from_pretrained(model)
        lines = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        Path(text).write_text(json.dumps([{"text": line} for line in lines]))
        amount["seqlen"] -= _MARGIN
        scheme = AutoScheme(avg_bits=settings["average_bits"], options=options, device_map="cpu", **amount)
    amount |= {"iters": settings["iters"], "device_map": "cpu", "enable_torch_compile": False}
    rounder = AutoRound(model, scheme=scheme, dataset=text, **amount)
    rounder.quantize_and_save(out, format="auto_round")


if __name__ == "__main__":
    main(*sys.argv[1:])
