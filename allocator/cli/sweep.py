"""Solve for many budgets: a table and a figure of gibibytes against loss.

Beside each budget stands the best uniform plan that fits it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.cli.options import add_figure, add_output, add_progress, add_rules, rules
from allocator.cli.output import print_csv, print_json, print_tables, show_progress
from allocator.cli.planning import add_traffic, plan_request
from allocator.contract.errors import InputError

if TYPE_CHECKING:
    from allocator.pipeline.measure import MeasureSettings
    from allocator.pipeline.sweep import GpuSettings

EXAMPLES = """examples:
  gamma sweep work/scores.json --from 2.25bits --to 4.5bits --points 10 --figure sweep.png --figure sweep.svg
  gamma sweep work/scores.json --from 5GiB --to 8GiB --points 30 --csv > sweep.csv
  gamma sweep work/scores.json --gpus l4,rtx4090 --model ./Qwen3-8B --max-model-len 8192 --price l4=0.71
  gamma sweep work/scores.json --from 2.25bits --to 4.5bits --points 6 --measure ./small-model --text held-out.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", type=Path, metavar="SCORES", help="scores.json of `gamma learn`")
    budgets = parser.add_argument_group("budgets")
    budgets.add_argument("--from", dest="lowest", metavar="BUDGET", help="average bits (2.25bits) or memory (5.9GiB)")
    budgets.add_argument("--to", dest="highest", metavar="BUDGET", help="likewise")
    budgets.add_argument("--points", type=int, default=20, help="budgets from --from to --to (default 20)")
    budgets.add_argument(
        "--relative-gap",
        type=float,
        default=0.0,
        help="stop each search when it is proven to be this near the best, e.g. 1e-4 (default: proven best)",
    )
    gpus = parser.add_argument_group("GPUs on the axis")
    gpus.add_argument("--gpus", metavar="NAME,NAME", help="cards to plan for (l4,rtx4090); the curve spans them")
    gpus.add_argument("--model", help="the scores' model, whose config.json is planned for: a folder or hub id")
    gpus.add_argument("--gpu-catalogue", type=Path, metavar="FILE", help="cards of your own (`gamma schema gpus`)")
    gpus.add_argument(
        "--price",
        type=_price,
        action="append",
        default=[],
        metavar="NAME=DOLLARS",
        help="$ a GPU-hour, e.g. l4=0.71; may be repeated; prints what the smaller GPU saves in a month of 730 hours",
    )
    add_traffic(parser)
    measuring = parser.add_argument_group("measured loss")
    measuring.add_argument(
        "--measure",
        type=Path,
        metavar="MODEL",
        help="measure each assignment and the uniform plans, with the weights of this model folder, block by block",
    )
    measuring.add_argument("--bank", type=Path, help="bank of the scores (default: `bank` beside SCORES)")
    measuring.add_argument("--text", type=Path, action="append", metavar="FILE", help="text, not that of --calibration")
    measuring.add_argument(
        "--manifest",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="manifest of the same scores whose loss was measured (`gamma solve --verify`, `gamma refine`), to show "
        "beside the curve; may be repeated",
    )
    measuring.add_argument("--sequences", type=int, default=32)
    measuring.add_argument("--sequence-length", type=int, default=512)
    add_rules(parser)
    add_figure(parser, "the curve")
    add_output(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from allocator.contract.scores import Scores
    from allocator.pipeline.sweep import SweepSettings, run_sweep
    from allocator.report.differences import read_manifest
    from allocator.report.figures import check_figure_path, save_figure
    from allocator.report.pareto import (  # fmt: skip
        SWEEP_COLUMNS,
        draw_sweep,
        sweep_document,
        sweep_rows,
        sweep_table,
    )

    figures = [check_figure_path(path) for path in args.figure]
    request = SweepSettings(
        lowest=args.lowest, highest=args.highest, points=args.points, rules=rules(args), fusion=args.fusion,
        relative_gap=args.relative_gap, gpus=_gpus(args), measure=_measure(args),
        manifests=[read_manifest(path) for path in args.manifest],
    )  # fmt: skip
    with show_progress(args.progress) as progress:
        found = run_sweep(Scores.read(args.scores), request, progress)
    if figures:
        save_figure(draw_sweep(found), figures)
    if args.json:
        print_json(sweep_document(found))
    elif args.csv:
        print_csv(SWEEP_COLUMNS, sweep_rows(found))
    else:
        print_tables(sweep_table(found))


def _price(text: str) -> tuple[str, float]:
    name, _, dollars = text.rpartition("=")
    try:
        value = float(dollars)
    except ValueError:
        value = -1.0
    if not name or not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DOLLARS an hour, such as l4=0.71")
    return name, value


def _gpus(args: argparse.Namespace) -> "GpuSettings | None":
    if args.gpus is None:
        if args.price:
            raise InputError("--price needs --gpus, whose names it prices")
        return None
    if args.model is None:
        raise InputError("--gpus needs --model: its config.json says how large the KV cache is")
    from allocator.pipeline.sweep import GpuSettings
    from allocator.plan import find_gpu, load_catalogue
    from allocator.plan.weights import read_model

    catalogue = load_catalogue(args.gpu_catalogue)
    devices = {name: find_gpu(name, catalogue) for name in args.gpus.split(",") if name}
    return GpuSettings(devices, read_model(args.model), plan_request(args), dict(args.price))


def _measure(args: argparse.Namespace) -> "MeasureSettings | None":
    from allocator.pipeline.measure import MeasureSettings, TextSettings

    if args.measure is None:
        if args.text or args.bank:
            raise InputError("--text and --bank belong to --measure MODEL")
        return None
    if not args.text:
        raise InputError("--measure needs --text FILE: text that the scores were not learned on")
    bank = args.bank or args.scores.parent / "bank"
    text = TextSettings(args.text, args.sequences, args.sequence_length, seed=1)
    return MeasureSettings(args.measure, bank, text)
