"""Runs a module as a program, with gamma checkpoints known to transformers.

python -m allocator.integrations lm_eval run --model hf --model_args pretrained=DIR --tasks lambada_openai
"""

import runpy
import sys

import allocator.integrations.transformers  # noqa: F401

if len(sys.argv) < 2:
    raise SystemExit("usage: python -m allocator.integrations MODULE [ARGUMENTS]")
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
