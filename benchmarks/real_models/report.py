"""From measured rows to `real_models.json`, the table of the README, and the figures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_models.catalogue import real_models
from benchmarks.real_models.cells import Bench
from benchmarks.real_models.figure import draw
from benchmarks.real_models.llama_cpp import FILE_TYPES
from benchmarks.real_models.losses import paired_interval
from benchmarks.record import claim, write_result

__all__ = ["claims_of", "comparisons", "not_measured", "table", "write_report", "write_table"]

ROOT = Path(__file__).resolve().parents[2]
MAIN = "WikiText-2"
_MARKS = ("<!-- real models -->\n", "<!-- end of real models -->")
_FROM_THREE_BITS = ("Q3_K_M", "IQ3_XXS", "IQ4_XS", "Q4_K_M")

Row = dict[str, Any]


def write_report(benches: Sequence[Bench], settings: dict[str, Any]) -> None:
    """Write the result, the README's table and a figure a model, from all rows that there are."""
    rows = [_public(row) for bench in benches for row in bench.rows()]
    compared = [found for bench in benches for found in comparisons(bench)]
    titles = {bench.model.name: bench.model.title for bench in benches}
    text = table(rows, titles)
    more = {"settings": settings, "not_measured": not_measured(rows, settings["budgets"])}
    write_result("real_models", "make bench-real", [0], [*rows, *compared], claims_of(rows, compared), more)
    write_table(ROOT / "README.md", text)
    for name, title in titles.items():
        draw([row for row in rows if row["model"] == name], title, ROOT / "docs" / "figures" / f"real-models-{name}")
    print(text)


def _public(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("texts", "source")}


def not_measured(rows: Sequence[Row], budgets: Sequence[float]) -> dict[str, Any]:
    """By model the rows that the result should have and has not."""
    wanted = [f"gamma {bits}" for bits in budgets]
    wanted += [f"uniform {bits}{vocabulary}" for bits in (2, 3, 4) for vocabulary in ("", ", vocabulary at 8")]
    wanted += [f"llama.cpp {file_type}" for file_type in FILE_TYPES]
    wanted += [f"AutoRound W{bits}" for bits in (2, 3, 4)]
    wanted += [f"AutoRound AutoScheme {bits}" for bits in budgets if bits >= 2.5]
    wanted += ["the original in bfloat16"]
    found: dict[str, Any] = {}
    for model in real_models():
        there = {row["row"] for row in rows if row["model"] == model.name}
        found[model.name] = [name for name in wanted if name not in there] if there else "nothing yet"
    return found


def comparisons(bench: Bench) -> list[Row]:
    """Mean KL of GAMMA's rows over that of what has the same bytes, with 95 % intervals, on each text."""
    rows = {row["row"]: row for row in bench.rows()}
    found = []
    for name, row in rows.items():
        against = row.get("beside") or row.get("widest_uniform")
        if not name.startswith("gamma") or against not in rows:
            continue
        for text in row["texts"]:
            low, high = paired_interval(bench.losses(name, text), bench.losses(against, text))
            ratio = row[text]["kl"] / rows[against][text]["kl"]
            entry = {"model": bench.model.name, "row": name, "against": against, "text": text}
            found.append(entry | {"ratio": round(ratio, 4), "interval": [round(low, 4), round(high, 4)]})
    return found


def claims_of(rows: Sequence[Row], compared: Sequence[Row]) -> list[dict[str, Any]]:
    """Of what was measured; a model or a rival without rows has no claim."""
    claims = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = {row["row"]: row for row in rows if row["model"] == model}
        ratios = [c for c in compared if c["model"] == model and c["text"] == MAIN]
        guard = [c["ratio"] for c in ratios if c["against"].startswith("uniform") and "bytes of" not in c["row"]]
        if guard:
            text = f"{model}: at every budget KL below that of the widest uniform plan of its bytes, largest ratio"
            claims.append(claim(text, max(guard), "< 1", max(guard) < 1))
        scheme = [c["ratio"] for c in ratios if c["against"].startswith("AutoRound AutoScheme")]
        if scheme:
            mean = round(sum(scheme) / len(scheme), 4)
            text = f"{model}: KL over that of AutoScheme with AutoRound at its bytes, mean over budgets"
            claims.append(claim(text, mean, "< 1", mean < 1))
        llama = [c["ratio"] for c in ratios if c["against"].removeprefix("llama.cpp ") in _FROM_THREE_BITS]
        if llama:
            text = f"{model}: from 3 bits on KL below that of llama.cpp's quants at their bytes, largest ratio"
            claims.append(claim(text, max(llama), "< 1", max(llama) < 1))
        if "gamma 2.5" in of_model and "uniform 3" in of_model:
            value = round(of_model["gamma 2.5"][MAIN]["kl"] / of_model["uniform 3"][MAIN]["kl"], 4)
            text = f"{model}: KL at 2.5 bits over that of uniform 3 bits, gptq"
            why = None if value <= 1 else "candidates of 2 bits lose too much: see the row of uniform 2 bits"
            claims.append(claim(text, value, "<= 1", value <= 1, why))
    return claims


def table(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Markdown: a row of a plan, and beside a rival's the figures of GAMMA at the rival's bytes."""
    lines = [
        "| model, WikiText-2 | MB of all tensors | KL | top-1 | perplexity | GAMMA at these bytes: KL | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, title in titles.items():
        of_model = [row for row in rows if row["model"] == model]
        beside = {row["beside"]: row for row in of_model if "beside" in row}
        plans = [row for row in of_model if "beside" not in row]
        for row in sorted(plans, key=lambda r: (r["tensor_bytes"], r["row"])):
            ours = beside.get(row["row"])
            cells = [_named(row, title), f"{row['tensor_bytes'] / 1e6:.1f}", *_cells(row), _perplexity(row)]
            cells += ["", ""] if ours is None else _cells(ours)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _named(row: Row, title: str) -> str:
    name = re.sub(r"^gamma (.*)$", r"**GAMMA, \1 bits**", row["row"])
    name = re.sub(r"^uniform (\d)", r"uniform gptq, \1 bits", name)
    return f"{title}: {name}"


def _cells(row: Row) -> list[str]:
    return [f"{row[MAIN]['kl']:.3f}", f"{100 * row[MAIN]['top1']:.1f} %"]


def _perplexity(row: Row) -> str:
    value = row[MAIN]["perplexity"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def write_table(page: Path, text: str) -> None:
    """Put `text` between the marks of `page`, which stays as it is without them."""
    content = page.read_text()
    before, mark, rest = content.partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    if mark and end:
        page.write_text(before + mark + text + end + after)
