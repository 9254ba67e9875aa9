"""The loads of the serving benchmark, and what the project demands of them."""

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.record import claim

__all__ = ["ARK", "AVX2_LOADS", "BF16", "CUDA_LOADS", "LOADS", "MARLIN", "STOCK", "Load", "claims_of"]

BF16, STOCK, MARLIN, ARK = "bf16", "stock 4 bits", "stock 4 bits, Marlin", "ARK, 3 bits"

Row = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """`sequences` at a time; `metric` of `vllm bench serve` in milliseconds: a token after the first, or the first."""

    name: str
    sequences: int
    prompt: int
    tokens: int
    requests: int
    metric: str


DECODE = (
    Load("decode, 1 sequence", 1, 32, 32, 4, "median_tpot_ms"),
    Load("decode, 8 sequences", 8, 32, 24, 8, "median_tpot_ms"),
    Load("decode, 32 sequences", 32, 32, 16, 32, "median_tpot_ms"),
)
PREFILL = (
    Load("prefill, 512 tokens", 1, 512, 1, 2, "median_ttft_ms"),
    Load("prefill, 2048 tokens", 1, 2048, 1, 1, "median_ttft_ms"),
)
LOADS = DECODE + PREFILL
AVX2_LOADS = (DECODE[0], *PREFILL)
CUDA_LOADS = (
    Load("decode, 1 sequence", 1, 32, 128, 2, "median_tpot_ms"),
    Load("decode, 8 sequences", 8, 32, 96, 8, "median_tpot_ms"),
    Load("decode, 32 sequences", 32, 32, 64, 32, "median_tpot_ms"),
    Load("prefill, 512 tokens", 1, 512, 1, 6, "median_ttft_ms"),
    Load("prefill, 2048 tokens", 1, 2048, 1, 6, "median_ttft_ms"),
)

WHY = {
    "decode": (
        "what vLLM itself does a token, about 6 ms of one core, does not shrink with the weights; nor does a "
        "vocabulary at 16 bits; see docs/kernels.md"
    ),
    "prefill": (
        "rounds of one server differ by as much: in one process on one core both take the same time (docs/kernels.md)"
    ),
    "fusion": "a layer of several widths is multiplied width by width; rounds of one server differ by more",
}


def claims_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Of every piece that was measured, each against its own bfloat16 and stock."""
    claims = []
    for first in [row for row in rows if row["variant"] == BF16]:
        piece = {row["variant"]: row for row in rows if row["piece"] == first["piece"]}
        if "gpu_gib_after_load" in first:
            claims += _on_gpu(piece)
        elif ARK in piece:
            claims += _on_avx2(piece)
        else:
            claims += _speeds(piece) if first["compiled"] else _started(piece)
    for row in rows:
        if row["variant"] == "answers":
            text = f"of {row['requests']} requests at once, answers that differ from one at a time"
            claims.append(claim(text, row["different"], "<= 0", row["different"] <= 0))
            text = "answers after the worker was killed and the server started again that differ"
            claims.append(claim(text, row["different_after_restart"], "<= 0", row["different_after_restart"] <= 0))
            text = "HTTP status of a request beyond max-model-len"
            claims.append(claim(text, row["too_long_status"], "== 400", row["too_long_status"] == 400))
    return claims


def _on_gpu(by_name: dict[str, Row]) -> list[dict[str, Any]]:
    """At 3 bits and one sequence 2.2 times bfloat16; not slower than stock 4-bit by the faster of its kernels; prefill
    within 5 % of the fastest; memory as planned; free widths as fast as tied ones."""
    claims, bf16, one = [], by_name[BF16], CUDA_LOADS[0]
    piece = bf16["piece"]
    stock = [row for name, row in by_name.items() if name in (STOCK, MARLIN)]
    for name, row in by_name.items():
        if not row["planned_bytes"]:
            continue
        if name.startswith("gamma 3.0"):
            value = _ms(bf16, one) / _ms(row, one)
            claims.append(_at_least(f"{piece}: {name}: {one.name}, speed over bf16", value, 2.2))
        value = min(_ms(other, one) for other in stock) / _ms(row, one)
        claims.append(_at_least(f"{piece}: {name}: {one.name}, speed over stock", value, 1.0))
        for load in [load for load in CUDA_LOADS if load.name.startswith("prefill")]:
            value = min(_ms(other, load) for other in (bf16, *stock)) / _ms(row, load)
            claims.append(_at_least(f"{piece}: {name}: {load.name}, speed over the best", value, 0.95))
        value = row["gpu_gib_after_load"] * 2**30 / row["planned_bytes"]
        claims.append(_at_most(f"{piece}: {name}: GPU memory after loading over planned weights", value, 1.05))
        if tied := _tied(name, by_name):
            value = _ms(tied, one) / _ms(row, one)
            claims.append(_at_least(f"{piece}: {name}: {one.name}, speed over tied fusion", value, 0.97))
    return claims


def _on_avx2(by_name: dict[str, Row]) -> list[dict[str, Any]]:
    """At 3 bits and one sequence twice bfloat16, and faster than ARK; prefill within 5 % of bfloat16."""
    claims, bf16, one = [], by_name[BF16], AVX2_LOADS[0]
    piece = bf16["piece"]
    for name, row in by_name.items():
        if not name.startswith("gamma"):
            continue
        if name.startswith("gamma 3.0"):
            value = _ms(bf16, one) / _ms(row, one)
            claims.append(_at_least(f"{piece}: {name}: {one.name}, speed over bf16", value, 2.0))
            value = _ms(by_name[ARK], one) / _ms(row, one)
            claims.append(_at_least(f"{piece}: {name}: {one.name}, speed over ARK", value, 1.0))
        for load in AVX2_LOADS[1:]:
            value = _ms(bf16, load) / _ms(row, load)
            claims.append(_at_least(f"{piece}: {name}: {load.name}, speed over bf16", value, 0.95))
    return claims


def _tied(name: str, by_name: dict[str, Row]) -> Row | None:
    """What has the same bits with one width a layer, of a variant with free widths."""
    return by_name.get(name.replace("free", "tied")) if "free" in name else None


def _at_least(text: str, value: float, limit: float) -> dict[str, Any]:
    why = None if value >= limit else "see the rows, and docs/kernels.md"
    return claim(text, round(value, 3), f">= {limit}", value >= limit, why)


def _at_most(text: str, value: float, limit: float) -> dict[str, Any]:
    why = None if value <= limit else "see the rows, and docs/kernels.md"
    return claim(text, round(value, 4), f"<= {limit}", value <= limit, why)


def _started(by_name: dict[str, Row]) -> list[dict[str, Any]]:
    """Code, cache and work space take the same whatever the widths; the rest must be what `gamma plan` says."""
    piece = by_name[BF16]["piece"]
    planned = [row for row in by_name.values() if row["planned_bytes"]]
    beyond = [row["anonymous_bytes_after_load"] - row["planned_bytes"] for row in planned]
    middle = statistics.median(beyond)
    value = max(abs(b - middle) / row["planned_bytes"] for b, row in zip(beyond, planned, strict=True))
    text = f"{piece}: memory of the worker less the plan's weights is one constant for all widths, but for, of the plan"
    why = None if value <= 0.05 else "see anonymous_bytes_after_load and planned_bytes of the rows"
    memory = claim(text, round(value, 4), "<= 0.05", value <= 0.05, why)
    value = by_name[STOCK]["load_seconds"] / max(by_name["gamma 4.0 bits, free"]["load_seconds"], 0.01)
    why = None if value >= 0.8 else "see load_seconds of the rows"
    text = f"{piece}: loading weights at 4 bits, speed over stock"
    return [memory, claim(text, round(value, 3), ">= 0.8", value >= 0.8, why)]


def _speeds(by_name: dict[str, Row]) -> list[dict[str, Any]]:
    claims: list[dict[str, Any]] = []
    bf16, stock = by_name[BF16], by_name[STOCK]
    piece = bf16["piece"]
    gamma = {name: row for name, row in by_name.items() if name.startswith("gamma")}

    busy = bf16.get("load_average_before", 0.0)
    shared = f"; the load average before was {busy}, of the piece before or of other work" if busy >= 1 else ""

    def at_least(text: str, value: float, limit: float, why: str) -> None:
        holds, why = value >= limit, why + shared
        claims.append(claim(f"{piece}: {text}", round(value, 3), f">= {limit}", holds, None if holds else why))

    one = DECODE[0]
    for name, row in gamma.items():
        at_least(f"{name}: {one.name}, speed over bf16", _ms(bf16, one) / _ms(row, one), 2.5, WHY["decode"])
        at_least(f"{name}: {one.name}, speed over stock", _ms(stock, one) / _ms(row, one), 1.0, WHY["decode"])
        for load in [load for load in PREFILL if load.name in row]:
            best = min(_ms(bf16, load), _ms(stock, load))
            at_least(f"{name}: {load.name}, speed over the better", best / _ms(row, load), 0.95, WHY["prefill"])
        if tied := _tied(name, gamma):
            for load in [load for load in LOADS if load.name in row]:
                value = _ms(tied, load) / _ms(row, load)
                at_least(f"{name}: {load.name}, speed over tied fusion", value, 0.97, WHY["fusion"])
    return claims


def _ms(row: Row, load: Load) -> float:
    return float(row[load.name]["milliseconds"])
