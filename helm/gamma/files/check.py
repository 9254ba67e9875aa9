"""`helm test`: every allocation is healthy, lists its model, and completes a prompt. Standard library only."""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request


def ask(url: str, timeout_seconds: float, body: dict | None = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout_seconds) as answer:
        return answer.read()


def check(base: str, timeout_seconds: float) -> str:
    """What the allocation at `base` answered. Raises what went wrong once the time is over."""
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            ask(f"{base}/health", 10)
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(2)
    model = json.loads(ask(f"{base}/v1/models", 30))["data"][0]["id"]
    request = {"model": model, "prompt": "The", "max_tokens": 8, "temperature": 0}
    answer = json.loads(ask(f"{base}/v1/completions", timeout_seconds, request))
    if not answer["usage"]["completion_tokens"]:
        raise ValueError(f"no token in the answer {answer}")
    return f"{model}: {answer['choices'][0]['text']!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each allocation")
    parser.add_argument("url", nargs="+")
    arguments = parser.parse_args()
    failed = 0
    for url in arguments.url:
        try:
            print(f"ok {url} {check(url, arguments.timeout)}", flush=True)
        except (OSError, ValueError, KeyError, IndexError) as error:
            print(f"FAILED {url}: {type(error).__name__}: {error}", flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
