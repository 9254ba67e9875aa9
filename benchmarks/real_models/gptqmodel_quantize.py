"""Quantizes a model with GPTQModel's own program, in an environment that has it.

    python gptqmodel_quantize.py MODEL TOKENS.safetensors OUT settings.json

TOKENS: token_ids, int64 `[sequences, length]`, the calibration text. settings: bits, group_size. Writes OUT, in GPTQ's
format.
"""

import json
import sys
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main(model: str, tokens_file: str, out: str, settings_file: str) -> None:
    settings = json.loads(Path(settings_file).read_text())
    rows = load_file(tokens_file)["token_ids"].tolist()
    found = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu")
    found.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    found.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
