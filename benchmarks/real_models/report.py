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
from benchmarks.real_models.ours import CANDIDATES, GPTQ, KFAC, LEARNED, TUNED, VOCABULARY_AT_8, Candidates, kind_of
from benchmarks.record import claim, write_result

__all__ = ["claims_of", "comparisons", "not_measured", "table", "write_report", "write_table"]

ROOT = Path(__file__).resolve().parents[2]
MAIN = "WikiText-2"
_MARKS = ("<!-- real models -->\n", "<!-- end of real models -->")
_FROM_THREE_BITS = ("Q3_K_M", "IQ3_XXS", "IQ4_XS", "Q4_K_M")
_THREE_BITS = _FROM_THREE_BITS[:2]
_UP_TO_FOUR_BITS = 4.0

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
    wanted = []
    for candidates in (c for c in CANDIDATES.values() if c != LEARNED):
        wanted += [f"gamma {bits}{candidates.suffix}" for bits in budgets]
        vocabularies = ("", VOCABULARY_AT_8)
        wanted += [
            f"uniform {bits}{vocabulary}{candidates.suffix}" for bits in (2, 3, 4) for vocabulary in vocabularies
        ]
    wanted += [f"llama.cpp {file_type}" for file_type in FILE_TYPES]
    wanted += [f"{program} W{bits}" for program in ("AutoRound", "GPTQModel") for bits in (2, 3, 4)]
    wanted += [f"AutoRound AutoScheme {bits}" for bits in budgets if bits >= 2.5]
    wanted += ["the original in bfloat16"]
    found: dict[str, Any] = {}
    for model in real_models():
        of_model = {row["row"]: row for row in rows if row["model"] == model.name}
        found[model.name] = [name for name in wanted if name not in of_model] if of_model else "nothing yet"
        without = [name for name, row in of_model.items() if name in wanted and "LAMBADA" not in row]
        if without:
            found[f"{model.name}, LAMBADA and BLiMP"] = without
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
    """Of what was measured; a model, a rival, or a kind of candidates without rows has no claim."""
    claims = []
    for model in dict.fromkeys(row["model"] for row in rows):
        kl = {row["row"]: row[MAIN]["kl"] for row in rows if row["model"] == model}
        ratios = [c for c in compared if c["model"] == model and c["text"] == MAIN]
        for candidates in CANDIDATES.values():
            ours = [c for c in ratios if kind_of(c["row"]) == candidates]
            claims += _at_equal_bytes(f"{model}{candidates.suffix}", ours)
            claims += _against_three_bits(f"{model}{candidates.suffix}", kl, candidates.suffix)
            if candidates != GPTQ:
                claims += _worth_of(candidates, model, kl, ours)
    return claims


def _at_equal_bytes(named: str, ratios: Sequence[Row]) -> list[dict[str, Any]]:
    claims = []
    guard = [c["ratio"] for c in ratios if c["against"].startswith("uniform") and "bytes of" not in c["row"]]
    if guard:
        text = f"{named}: at every budget KL below that of the widest uniform plan of its bytes, largest ratio"
        claims.append(claim(text, max(guard), "< 1", max(guard) < 1))
    scheme = [c["ratio"] for c in ratios if c["against"].startswith("AutoRound AutoScheme")]
    if scheme:
        mean = round(sum(scheme) / len(scheme), 4)
        text = f"{named}: KL over that of AutoScheme with AutoRound at its bytes, mean over budgets"
        claims.append(claim(text, mean, "< 1", mean < 1))
    llama = _against_llama(ratios, _FROM_THREE_BITS)
    if llama:
        text = f"{named}: from 3 bits on KL below that of llama.cpp's quants at their bytes, largest ratio"
        claims.append(claim(text, max(llama), "< 1", max(llama) < 1))
    return claims


def _against_llama(ratios: Sequence[Row], file_types: Sequence[str]) -> list[float]:
    return [c["ratio"] for c in ratios if c["against"].removeprefix("llama.cpp ") in file_types]


def _against_three_bits(named: str, kl: dict[str, float], suffix: str) -> list[dict[str, Any]]:
    """2.5 bits against gptq's uniform 3: everything counted, and in the blocks with the vocabulary at 8 bits in both.
    From learned candidates half is wanted."""
    claims = []
    most = 0.5 if suffix else 1.0
    for vocabulary in ("", VOCABULARY_AT_8):
        ours, theirs = f"gamma 2.5{vocabulary}{suffix}", f"uniform 3{vocabulary}"
        if ours in kl and theirs in kl:
            value = round(kl[ours] / kl[theirs], 4)
            text = f"{named}: KL at 2.5 bits over that of uniform 3 bits, gptq{vocabulary}"
            why = None if value <= most else f"candidates of 2 bits lose too much: see the row uniform 2{vocabulary}"
            claims.append(claim(text, value, f"<= {most:g}", value <= most, why))
    return claims


def _worth_of(kind: Candidates, model: str, kl: dict[str, float], ratios: Sequence[Row]) -> list[dict[str, Any]]:
    """What learning to round brings over gptq's candidates at the same budgets, and against llama.cpp's 3 bits."""
    claims = []
    gain = {}
    for name, value in kl.items():
        bits = re.fullmatch(r"gamma ([\d.]+)", name)
        if bits and float(bits[1]) <= _UP_TO_FOUR_BITS and name + kind.suffix in kl:
            gain[bits[1]] = round(kl[name + kind.suffix] / value, 4)
    if gain:
        text = f"{model}{kind.suffix}: KL over that with gptq's candidates, at every budget to 4 bits, largest ratio"
        worst = max(gain.values())
        why = (
            None if worst < 1 else "more is lost at so few bits than its prediction to second order says: docs/scale.md"
        )
        claims.append(
            claim(f"{text} ({', '.join(f'{b}: {r}' for b, r in gain.items())})", worst, "< 1", why is None, why)
        )
    llama = _against_llama(ratios, _THREE_BITS)
    if llama:
        text = f"{model}{kind.suffix}: KL below that of llama.cpp's quants of 3 bits at their bytes, largest ratio"
        claims.append(claim(text, max(llama), "< 1", max(llama) < 1))
    uniform = {bits: (f"uniform {bits}{VOCABULARY_AT_8}", most) for bits, most in ((2, 1 / 3), (3, 0.7))}
    for bits, (name, most) in uniform.items():
        if name in kl and name + kind.suffix in kl:
            value = round(kl[name + kind.suffix] / kl[name], 4)
            text = f"{model}{kind.suffix}: KL of uniform {bits} bits over that of gptq{VOCABULARY_AT_8}"
            why = None if value <= most else "one module is rounded at a time, so that candidates suit any neighbours"
            claims.append(claim(text, value, f"<= {most:.3g}", why is None, why))
    return claims


def table(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Markdown: a row of a plan, and beside a rival's the figures of GAMMA at the rival's bytes, from each kind of
    candidates that was measured there. Where those of the default were measured, others are left to the result."""
    if any(row["row"].startswith("gamma") and kind_of(row["row"]) == KFAC for row in rows):
        rows = [row for row in rows if _is_shown(row["row"])]
    kinds = [kind for kind in CANDIDATES.values() if any(_beside(row, kind.suffix) for row in rows)]
    lines = ["| model, WikiText-2 | MB of all tensors | KL | top-1 | perplexity |", "|---|---|---|---|---|"]
    for kind in kinds:
        suffix = "" if kind == KFAC else kind.suffix
        lines[0] += f" GAMMA at these bytes{suffix}: KL | top-1 |"
        lines[1] += "---|---|"
    for model, title in titles.items():
        of_model = [row for row in rows if row["model"] == model]
        plans = [row for row in of_model if "beside" not in row]
        for row in sorted(plans, key=lambda r: (r["tensor_bytes"], r["row"])):
            cells = [_named(row, title), f"{row['tensor_bytes'] / 1e6:.1f}", *_cells(row), _perplexity(row)]
            for kind in kinds:
                ours = [r for r in of_model if _beside(r, kind.suffix) and r["beside"] == row["row"]]
                cells += _cells(ours[0]) if ours else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + _tasks(rows, titles)


def _is_shown(name: str) -> bool:
    kinds = (KFAC, TUNED) if name.startswith("gamma") else (GPTQ, KFAC, TUNED)
    return kind_of(name) in kinds


def _beside(row: Row, suffix: str) -> bool:
    return "beside" in row and row["row"] == f"gamma at the bytes of {row['beside']}{suffix}"


def _tasks(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Markdown of what lm-eval measured, with standard errors; empty if it measured nothing."""
    measured = [row for row in rows if "LAMBADA" in row and row["model"] in titles]
    if not measured:
        return ""
    documents = sorted({(row["LAMBADA"]["documents"], row["BLiMP"]["documents"]) for row in measured})
    counts = ", ".join(f"{of_lambada} and {of_blimp} documents" for of_lambada, of_blimp in documents)
    lines = ["", f"| model, lm-eval ({counts}) | MB | LAMBADA | BLiMP |", "|---|---|---|---|"]
    for row in sorted(measured, key=lambda r: (list(titles).index(r["model"]), r["tensor_bytes"], r["row"])):
        figures = [
            f"{100 * row[task]['accuracy']:.1f} ± {100 * row[task]['accuracy_error']:.1f} %"
            for task in ("LAMBADA", "BLiMP")
        ]
        name, megabytes = _named(row, titles[row["model"]]), f"{row['tensor_bytes'] / 1e6:.1f}"
        lines.append("| " + " | ".join([name, megabytes, *figures]) + " |")
    return "\n".join(lines) + "\n"


def _named(row: Row, title: str) -> str:
    name = row["row"].removesuffix(KFAC.suffix) if row["row"].startswith("gamma") else row["row"]
    name = re.sub(r"^gamma ([\d.]+)(.*)$", r"**GAMMA, \1 bits\2**", name)
    name = re.sub(r"^uniform (\d)(.*)$", r"uniform gptq, \1 bits\2", name)
    if row["row"].startswith("uniform") and kind_of(row["row"]) == KFAC:
        name = name.removesuffix(KFAC.suffix).replace("gptq", "kfac")
    elif row["row"].startswith("uniform") and kind_of(row["row"]) != GPTQ:
        name = name.replace(" gptq", "")
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
