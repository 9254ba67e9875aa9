"""Do widths by channel block pay? `--granularity channel-block` against modules at equal bytes; other cuts; decode.

    make bench-channel-blocks

product: learned and solved as `gamma` does it, gptq, two models, groups of 64 and 128, KL from the original on
held-out text. cuts: what other ways of cutting would gain, to first order (see `scan.py`). decode: what it costs one
layer on the CPU. Parts that are done are kept in bench-out. Writes benchmarks/results/channel_blocks.json.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GAMMA_KERNEL"] = "native"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.channel_blocks.product import compare, paired  # noqa: E402
from benchmarks.channel_blocks.scan import scan  # noqa: E402
from benchmarks.channel_blocks.speed import measure_decode  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402

GROUPS = (64, 128)
PAYS, COSTS = 1.0, 1.05
"""The KL ratio below which, interval and all, channel blocks pay; and the time that they may take by that of whole
modules."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one part, e.g. product-demo-64, cuts-demo-gptq, decode")
    parser.add_argument("--partial", action="store_true", help="write the result of the parts that are done")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "channel-blocks")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="models/ and text/")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models: dict[str, tuple[Path, Path | None]] = {"demo": (ROOT / "benchmarks" / "demo" / "model", None)}
    if (args.shared / "models" / "ref-7m").is_dir():
        models["ref-7m"] = (args.shared / "models" / "ref-7m", args.shared / "text")
    parts: dict[str, Callable[[Path], list[Row]]] = {"decode": lambda _work: measure_decode()}
    for name, (folder, text) in models.items():
        for group in GROUPS:
            parts[f"product-{name}-{group}"] = lambda w, n=name, f=folder, g=group, t=text: compare(n, f, g, t, w)
        for quantizer in ("gptq", "rtn"):
            parts[f"cuts-{name}-{quantizer}"] = lambda w, n=name, f=folder, q=quantizer, t=text: scan(n, f, q, t, w)
    rows: dict[str, list[Row]] = {}
    for part, run in parts.items():
        saved = args.folder / f"{part}.json"
        if not saved.exists() and args.only in (None, part):
            with tempfile.TemporaryDirectory() as work:
                saved.write_text(json.dumps(run(Path(work))))
        if saved.exists():
            rows[part] = json.loads(saved.read_text())
    missing = [part for part in parts if part not in rows]
    if missing:
        print("not done yet:", ", ".join(missing))
        if not args.partial:
            return
    claims = _of_product(rows) + _of_decode(rows.get("decode", []))
    for c in claims:
        print(c)
    command = "make bench-channel-blocks" + (f" (partial: without {', '.join(missing)})" if missing else "")
    shown = [
        {"part": part.partition("-")[0]} | {key: value for key, value in row.items() if key != "kl_by_sequence"}
        for part, of_part in rows.items()
        for row in of_part
    ]
    print(write_result("channel_blocks", command, [0], shown, claims).relative_to(ROOT))


def _of_product(rows: dict[str, list[Row]]) -> list[dict[str, Any]]:
    claims = []
    for part, of_part in rows.items():
        if part.startswith("product"):
            whole = [r for r in of_part if r["granularity"] == "module"]
            cut = [r for r in of_part if r["granularity"] != "module"]
            mean, low, high = paired(cut, whole)
            text = (
                f"{part.removeprefix('product-')}: KL with channel blocks by that with whole modules, same bytes, mean "
                f"of 2.5 to 4 bits (95 %: {low:.3f} to {high:.3f})"
            )
            why = None if high < PAYS else "the interval has 1 in it: no gain that these sequences can tell from none"
            claims.append(claim(text, mean, f"interval below {PAYS}", high < PAYS, why))
    return claims


def _of_decode(rows: list[Row]) -> list[dict[str, Any]]:
    claims = []
    for row in rows:
        if row["layer"].startswith("cut"):
            ratio = row["milliseconds"] / row["milliseconds_of_whole"]
            text = f"decode, one layer {row['layer']}: CPU time by that of the same weights in whole modules"
            why = None if ratio <= COSTS else "each piece has a start of its own"
            claims.append(claim(text, ratio, f"<= {COSTS}", ratio <= COSTS, why))
    return claims


if __name__ == "__main__":
    main()
