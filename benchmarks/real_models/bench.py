"""GAMMA on models that people know, against uniform widths, llama.cpp, AutoRound and GPTQModel, at equal bytes.

    make bench-real           # all of it; says first how much it downloads, and about how long it takes
    make bench-real ARGS="--models smollm2 --budgets 2.5 3 --rivals uniform"
    make bench-real ARGS="--models smollm2 --rivals autoround --rows 'AutoRound W2'"     # one row alone

Every row is kept in bench-out/real_models as it is measured, so that a stopped run goes on, and several may run at a
time. Writes benchmarks/results/real_models.json and docs/figures/real_models_*.{png,svg}; --report does only that.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.contract.errors import GammaError, InputError  # noqa: E402
from benchmarks.real_models.autoround import ITERATIONS, AutoRound  # noqa: E402
from benchmarks.real_models.catalogue import MOVED, RealModel, real_models  # noqa: E402
from benchmarks.real_models.cells import OFF_GRID, Bench  # noqa: E402
from benchmarks.real_models.gptqmodel import GptqModel  # noqa: E402
from benchmarks.real_models.llama_cpp import FILE_TYPES, LlamaCpp  # noqa: E402
from benchmarks.real_models.models import ready  # noqa: E402
from benchmarks.real_models.off_grid import RESCALABLE  # noqa: E402
from benchmarks.real_models.ours import CANDIDATES, GPTQ, KFAC, TUNED, Ours  # noqa: E402
from benchmarks.real_models.report import write_report  # noqa: E402
from benchmarks.real_models.tasks import Tasks  # noqa: E402

BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5)
BITS_BESIDE_8 = (2.5, 3.0)
"""Of the blocks, where the vocabulary is at 8 bits: as the paper counts."""
MODELS = ("smollm2", f"smollm2{MOVED}", "gemma3", "qwen2.5-coder")
CALIBRATION, WINDOWS, DOCUMENTS = (32, 512), (8, 512), 200
TUNING = ("--sequences", "256", "--sequence-length", "512")
"""Rounding that is learned on little text learns the text."""


def estimate(models: list[RealModel]) -> str:
    """What will be downloaded, and how long it takes, before anything is done."""
    missing = [model for model in models if not (model.folder / "config.json").exists()]
    megabytes = sum(model.download_bytes for model in missing if not model.gguf.exists()) / 1e6
    hours = sum(model.hours for model in models)
    titles = ", ".join(model.title for model in models)
    return (
        f"{titles}: {megabytes:.0f} MB of models to download, and 70 MB of packages (rivals, chats) the first time; "
        f"about {hours:.0f} hours on two cores where nothing is there yet, most of it AutoRound (--rivals leaves it "
        "out), tuned rows not counted (--candidates leaves them out). It can be stopped, and goes on where it was."
    )


def rescalable(bench: Bench) -> bool:
    """Whether rows off the file's grid can be made, and are not those of the model itself."""
    return bench.inventory.config["model_type"] in RESCALABLE and not bench.model.name.endswith(MOVED)


def run(bench: Bench, series: list[Ours], args: argparse.Namespace) -> None:
    """Every row of one model: what is GAMMA's alone first, for each row of another program GAMMA at its bytes last."""
    own = series if bench.may_want("gamma") or bench.may_want("uniform") else []  # else nothing needs to be learned
    for ours in own:
        ours.learn("uniform" if args.bank_only else "gamma")
        if "uniform" in args.rivals:
            ours.uniform()
            if ours.candidates == GPTQ and rescalable(bench):
                ours.off_grid()
        if not args.bank_only:
            at_budgets(bench, ours, args.budgets)
    series[0].floor()
    for name, rows_of in PROGRAMS.items():
        if name in args.rivals:
            try:
                rows_of(bench, series[0], args)
            except InputError as error:  # what cannot be had here leaves its rows out, and no others
                print(f"{bench.model.name}: rows of {name} are left out: {error}", flush=True)
    if not args.bank_only:
        for ours in own:
            at_bytes_of_rivals(bench, ours)


def at_budgets(bench: Bench, ours: Ours, bits: list[float]) -> None:
    for wanted, budget in ours.budgets(bits).items():
        if budget is None:
            print(f"{bench.model.name}: no assignment has {wanted} average bits", flush=True)
        else:
            ours.gamma(f"gamma {wanted}", budget, bits=wanted, widest_uniform=ours.widest_uniform(budget))
    for wanted, budget in ours.budgets([b for b in bits if b in BITS_BESIDE_8], pinned=True).items():
        if budget is not None:
            ours.gamma_beside_8_bits(wanted, budget)


def llama_cpp(bench: Bench, ours: Ours, _: argparse.Namespace) -> None:
    llama = LlamaCpp(bench, ours.calibration())
    for file_type in FILE_TYPES:
        llama.row(file_type)
    if rescalable(bench):
        llama.off_grid()


def autoround(bench: Bench, ours: Ours, args: argparse.Namespace) -> None:
    AutoRound(bench, ours.calibration(), args.autoround_iterations).rows(args.budgets)


def gptqmodel(bench: Bench, ours: Ours, _: argparse.Namespace) -> None:
    GptqModel(bench, ours.calibration()).rows()


PROGRAMS = {"llama.cpp": llama_cpp, "autoround": autoround, "gptqmodel": gptqmodel}


def at_bytes_of_rivals(bench: Bench, ours: Ours) -> None:
    """Not tuned: there are many, and tuning takes as long for each as for a budget."""
    smallest = ours.scores.feasible_bytes()[0]
    suffixes = [candidates.suffix for candidates in CANDIDATES.values() if candidates.suffix]
    for row in [] if ours.candidates.tuned else bench.rows():
        if "rival" in row and not row["row"].endswith((OFF_GRID, *suffixes)) and row["tensor_bytes"] > smallest:
            ours.gamma(f"gamma at the bytes of {row['row']}", row["tensor_bytes"], beside=row["row"])


def opened(model: RealModel, args: argparse.Namespace, tasks: Tasks | None) -> Bench:
    wikitext = args.texts / "wikitext2.valid.raw"
    return Bench(model, ready(model), args.work / model.name, wikitext, *args.windows, tasks, args.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="names in models.json, or with -moved after them"
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BITS), help="average bits")
    parser.add_argument("--rivals", nargs="*", choices=("uniform", *PROGRAMS), default=["uniform", *PROGRAMS])
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        default=[GPTQ.name, KFAC.name, TUNED.name],
        help="what GAMMA chooses among; tuned: kfac's, those that it has chosen learned anew",
    )
    parser.add_argument("--tuning", default=" ".join(TUNING), help=f"arguments of gamma tune (default {TUNING})")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="only rows with such names")
    parser.add_argument("--autoround-iterations", type=int, default=ITERATIONS, help="steps a block; default: its own")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-out" / "real_models", help="folder for the rows")
    parser.add_argument(
        "--texts", type=Path, default=ROOT.parent / "shared" / "data" / "text", help="wikitext2.valid.raw, c4.calib.txt"
    )
    parser.add_argument("--calibration", type=int, nargs=2, default=CALIBRATION, metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument(
        "--windows", type=int, nargs=2, default=WINDOWS, metavar=("SEQUENCES", "LENGTH"), help="of each text"
    )
    parser.add_argument(
        "--tasks", type=Path, default=ROOT.parent / "shared" / "data" / "tasks", help="folder of LAMBADA and BLiMP"
    )
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="of LAMBADA, and about as many of BLiMP; 0: neither"
    )
    parser.add_argument("--bank-only", action="store_true", help="candidates and rivals, without learning scores")
    parser.add_argument("--report", action="store_true", help="only write the result of the rows that there are")
    args = parser.parse_args()
    try:
        models = real_models(args.models)
        for name in ("wikitext2.valid.raw", "c4.calib.txt"):
            if not (args.texts / name).is_file():
                raise InputError(f"{args.texts} has no {name}; give the folder of the texts with --texts")
        tasks = Tasks(args.tasks, args.documents) if args.documents else None
        if not args.report:
            if tasks is not None:
                tasks.check()
            print(estimate(models), flush=True)
        for model in [] if args.report else models:
            bench = opened(model, args, tasks)
            text, amount = args.texts / "c4.calib.txt", tuple(args.calibration)
            tune_with = args.tuning.split()
            run(bench, [Ours(bench, text, amount, CANDIDATES[name], tune_with) for name in args.candidates], args)
        if not args.bank_only:
            settings = {
                "budgets": args.budgets,
                "calibration": ["c4.calib.txt", *args.calibration],
                "tuning": args.tuning,
                "windows": args.windows,
                "documents": args.documents,
            }
            measured = [m for m in real_models(MODELS) if any((args.work / m.name).glob("cells/*.json"))]
            write_report([opened(model, args, tasks) for model in measured], settings)
    except GammaError as error:
        raise SystemExit(f"bench-real: {error}") from None


if __name__ == "__main__":
    main()
