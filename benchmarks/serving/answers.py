"""Answers under load: many requests at once against one at a time, a killed worker, a request that is too long."""

import json
import os
import random
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from allocator.model import read_inventory
from benchmarks.serving.checkpoints import TOKENIZER, assign, write_checkpoint
from benchmarks.serving.servers import Server, start

__all__ = ["ask"]

REQUESTS, CONTEXT, VOCABULARY, SEED = 200, 256, 4096, 3

Request = tuple[list[int], int]
"""Tokens of the prompt, and how many to write."""


def ask(out: Path) -> Iterator[list[dict[str, Any]]]:
    """One row. The demo model's shape with mixed widths, in float32: bfloat16 decides near ties by who shares a batch,
    in vLLM without the plugin as well. On a GPU that is our torch kernel, since humming takes no float32."""
    manifest = assign(read_inventory(TOKENIZER), 3.5, "free", "quantized")
    folder = write_checkpoint(TOKENIZER, manifest, out / "answers-checkpoint")
    draw = random.Random(SEED)
    requests = [
        ([draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 150))], draw.randint(1, 32))
        for _ in range(REQUESTS)
    ]
    flags = ("--dtype", "float32", "--enforce-eager")
    server = start(folder, out / "answers.log", CONTEXT, None, *flags)
    try:
        server.wait_ready()
        singly = [complete(server, request) for request in requests]
        with ThreadPoolExecutor(REQUESTS) as pool:
            together = list(pool.map(lambda request: complete(server, request), requests))
        status = 200
        try:
            complete(server, ([1] * (CONTEXT + 1), 1))
        except urllib.error.HTTPError as refused:
            status = refused.code
        os.kill(server.engine, signal.SIGKILL)
        server.process.wait(120)  # it ends by itself, so that whoever started it can start it again
    finally:
        server.stop()
    server = start(folder, out / "answers-again.log", CONTEXT, None, *flags)
    try:
        server.wait_ready()
        again = [complete(server, request) for request in requests[:20]]
    finally:
        server.stop()
    row = {
        "piece": "answers",
        "model": "demo",
        "variant": "answers",
        "requests": REQUESTS,
        "tokens": sum(map(len, singly)),
    }
    row |= {"different": _different(singly, together), "too_long_status": status}
    yield [row | {"different_after_restart": _different(singly[:20], again)}]


def complete(server: Server, request: Request) -> list[int]:
    """Greedy tokens. Raises HTTPError as the server does."""
    prompt, tokens = request
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    content = json.dumps(body | {"return_token_ids": True}).encode()
    call = urllib.request.Request(f"{server.url}/v1/completions", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=300) as response:
        return list(json.load(response)["choices"][0]["token_ids"])


def _different(expected: list[list[int]], found: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(expected, found, strict=True))
