"""Options that several verbs share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.contract.errors import InputError
from allocator.contract.layout import GROUP_SIZES, WIDTHS
from allocator.pipeline.effort import DEFAULT_EFFORT, EFFORTS
from allocator.run.progress import Progress, silent

if TYPE_CHECKING:  # imported late, to keep `gamma --help` fast
    from allocator.evaluate import Student
    from allocator.pipeline import CandidateSettings, SolveSettings
    from allocator.plan import Plan
    from allocator.score.settings import LearningSettings
    from allocator.solve.units import Rules

__all__ = [
    "add_budget",
    "add_figure",
    "add_json",
    "add_learning",
    "add_measuring",
    "add_model",
    "add_output",
    "add_progress",
    "add_resume",
    "add_rules",
    "candidate_settings",
    "learning_settings",
    "measure_student",
    "rules",
    "solve_settings",
]


_CHANNEL_BLOCKS = 8


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face model folder, or a hub id (org/name, hf://org/name@revision)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=["bar", "lines", "json", "none"],
        help="how far the work is, on stderr: a bar (default on a terminal), a line every 30 seconds (default "
        "elsewhere), such lines as JSON, or nothing",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")
    group.add_argument("--csv", action="store_true", help="print CSV on stdout instead of a table")


def add_figure(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--figure",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"draw {what} to a .png or .svg file; may be repeated (needs the extra gamma-vllm[report])",
    )


def add_budget(parser: argparse.ArgumentParser, required: bool = True, plan: bool = False) -> None:
    """`plan` adds --plan, a budget in bytes after loading."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--budget", help="bytes of all tensors of the checkpoint, e.g. 5.9GiB, 6GB, 123456789")
    group.add_argument(
        "--average-bits",
        type=float,
        help="stored bits a weight over the modules that can be quantized, scales and zero points included",
    )
    if plan:
        group.add_argument(
            "--plan",
            type=Path,
            metavar="PLAN",
            help="plan.json of `gamma plan --out`: the budget is the bytes that a rank has for weights after loading",
        )
    add_rules(parser, by_plan=plan)


def add_rules(parser: argparse.ArgumentParser, by_plan: bool = False) -> None:
    """`by_plan`: --fusion may be left to the plan."""
    for name, what in (("pin", "exactly"), ("ceiling", "at most"), ("floor", "at least")):
        parser.add_argument(
            f"--{name}",
            type=_rule,
            action="append",
            default=[],
            metavar="PATTERN=BITS",
            help=f"modules that match take {what} this width, e.g. '*.down_proj=4'; may be repeated",
        )
    parser.add_argument(
        "--fusion",
        choices=["auto", "free", "tied"] if by_plan else ["free", "tied"],
        default="auto" if by_plan else "free",
        help="tied: one width for the modules that vLLM fuses into one layer (q/k/v, gate/up)"
        + ("; auto (default): tied with a plan for CUDA, where free widths cost decode time, else free" * by_plan),
    )


def _rule(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal() or int(bits) not in WIDTHS:
        allowed = ", ".join(map(str, WIDTHS))
        raise argparse.ArgumentTypeError(f"{text!r}: expected PATTERN=BITS with bits one of {allowed}")
    return pattern, int(bits)


def rules(args: argparse.Namespace) -> "Rules":
    from allocator.solve.units import Rules

    return Rules(dict(args.pin), dict(args.ceiling), dict(args.floor))


def solve_settings(args: argparse.Namespace, plan: "Plan | None" = None) -> "SolveSettings":
    """`plan` decides about --fusion auto."""
    from allocator.pipeline import SolveSettings
    from allocator.plan.fusion import fusion_for

    return SolveSettings(
        budget=args.budget,
        average_bits=args.average_bits,
        rules=rules(args),
        fusion=fusion_for(args.fusion, plan),
    )


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        widths = ()
    if not widths or not set(widths) <= set(WIDTHS):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are {','.join(map(str, WIDTHS))}")
    return widths


def add_learning(parser: argparse.ArgumentParser) -> None:
    bank = parser.add_argument_group("candidates")
    bank.add_argument(
        "--effort",
        choices=list(EFFORTS),
        default=DEFAULT_EFFORT,
        help="time for good candidates: fast: gptq; thorough (default): kfac; best: kfac, and `gamma fit` tunes what "
        "it has chosen",
    )
    bank.add_argument(
        "--quantizer",
        help="instead of the one of --effort: gptq, kfac, learned-rounding, mse, rtn, or one that a package registers",
    )
    bank.add_argument("--widths", type=_widths, default=WIDTHS, help="default: 2,3,4,5,6,8,16")
    bank.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
    bank.add_argument("--symmetric", action="store_true", help="no zero points (default: asymmetric)")
    bank.add_argument(
        "--granularity",
        choices=["module", "channel-block"],
        default="module",
        help="what gets a width: whole modules (default), or in an MLP blocks of output channels of gate_proj and "
        "up_proj, sorted by importance; such checkpoints are served by the plugin only",
    )
    bank.add_argument(
        "--channel-blocks",
        type=int,
        metavar="P",
        help="with --granularity channel-block: how many blocks a module (default 8); it must divide the module",
    )
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration",
        type=Path,
        action="append",
        metavar="FILE",
        help="text (.txt, .jsonl, .ndjson, .json, .csv, .tsv, also .xz, .gz, .bz2) of any size, or chats, which the "
        "model's chat template renders; may be repeated; without it a model of up to 2 billion parameters writes "
        "its own, for a larger one the documentation and sources of Python are taken",
    )
    text.add_argument("--sequences", type=int, help="default: 128; fewer for a model below 67 million parameters")
    text.add_argument(
        "--sequence-length",
        type=int,
        help="at most what the model allows; default: 2048, less for a model below 67 million parameters. Where "
        "one of both is given, the other is 128 or 2048",
    )
    learning = parser.add_argument_group("learning")
    learning.add_argument(
        "--method",
        choices=["gamma", "relaxed", "measured", "uniform"],
        default="gamma",
        help="where the scores come from: gamma (default); or, to compare with: relaxed (Gumbel samples at a training "
        "budget, as the method was published), measured (KL divergence of each swap), uniform (all weights alike, "
        "without text: to try things out)",
    )
    learning.add_argument(
        "--train-average-bits",
        type=float,
        default=3.0,
        help="budget that `relaxed` learns at (default 3.0); its scores serve every other budget too",
    )
    learning.add_argument(
        "--draws", type=int, default=8, help="gradients a position that losses are measured with (default 8)"
    )
    learning.add_argument(
        "--seed", type=int, default=0, help="which windows of the text, which signs of the gradients (default 0)"
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The model, its bank, and text to measure an assignment on."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--model", metavar="MODEL", help="the original: a Hugging Face folder, or a hub id")
    group.add_argument("--bank", type=Path, metavar="DIR", help="candidates (default: the folder bank beside SCORES)")
    group.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="text to measure on (as --calibration of learn), best such that was not calibrated on; may be repeated",
    )
    group.add_argument("--text-sequences", type=int, default=32, help="default 32")
    group.add_argument(
        "--text-sequence-length", type=int, default=512, help="default 512, at most what the model allows"
    )
    group.add_argument("--text-seed", type=int, default=1, help="which windows of the text (default 1)")


def measure_student(args: argparse.Namespace, scores_path: Path, progress: Progress = silent) -> "Student":
    """What `add_measuring` asks for. Raises InputError if an option is missing."""
    from allocator.evaluate import open_student
    from allocator.pipeline import resolve_model

    for name in ("model", "text"):
        if not getattr(args, name):
            raise InputError(f"--{name} is missing: measuring runs the original model and the candidates on a text")
    _positive(args, "text_sequences", "text_sequence_length")
    progress.begin("opening the model")
    return open_student(
        resolve_model(args.model), args.bank or scores_path.parent / "bank", args.text,
        args.text_sequences, args.text_sequence_length, args.text_seed,
    )  # fmt: skip


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        choices=["auto", "must", "never"],
        default="auto",
        help="auto: go on from what an earlier run left in the work folder and still fits; another model's work is "
        "refused (default). must: fail if there is nothing to go on from, or if text, settings or versions differ. "
        "never: delete it and begin anew",
    )


def candidate_settings(args: argparse.Namespace) -> "CandidateSettings":
    from allocator.pipeline import CandidateSettings

    _positive(args, "sequences", "sequence_length")
    blocks: int | None = args.channel_blocks
    if args.granularity == "channel-block":
        blocks = _CHANNEL_BLOCKS if blocks is None else blocks
    elif blocks is not None:
        raise InputError(f"--channel-blocks {blocks} counts only with --granularity channel-block; give both or none")
    return CandidateSettings(
        quantizer=args.quantizer or EFFORTS[args.effort].quantizer,
        widths=args.widths,
        group_size=args.group_size,
        symmetric=args.symmetric,
        channel_blocks=blocks,
        calibration=args.calibration,
        sequences=args.sequences,
        sequence_length=args.sequence_length,
        seed=args.seed,
    )


def learning_settings(args: argparse.Namespace) -> "LearningSettings":
    from allocator.score.settings import LearningSettings

    _positive(args, "draws", "train_average_bits")
    return LearningSettings(method=args.method, draws=args.draws, average_bits=args.train_average_bits, seed=args.seed)


def _positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(args, name)) is not None and not value > 0:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {value}: must be greater than 0")
