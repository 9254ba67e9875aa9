"""Every method of allocation on the same candidates and the same exact bytes, judged on text that none has seen.

    make bench-allocation

Each cell (model, quantizer, group size, method, budget) is kept in WORK as it is done, with the losses of every
held-out sequence, so that a stopped run goes on; delete a cell's file, and a method's scores, to run it anew. Writes
benchmarks/results/allocation.json, which has means and intervals, figures into docs/figures, and tables on stdout.
"""

import argparse
import json
import lzma
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.blocks.calibration import calibration_from_model, calibration_from_text  # noqa: E402
from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.contract.scores import Scores  # noqa: E402
from allocator.evaluate import RefineSettings, refine  # noqa: E402
from allocator.pipeline import CandidateSettings, learn  # noqa: E402
from allocator.score import LearningSettings  # noqa: E402
from allocator.score.methods import METHODS  # noqa: E402
from benchmarks.allocation.block_errors import WEIGHTINGS, block_error_tables  # noqa: E402
from benchmarks.allocation.deltaloss import learn_deltaloss  # noqa: E402
from benchmarks.allocation.fisher import learn_fisher  # noqa: E402
from benchmarks.allocation.laboratory import Laboratory  # noqa: E402
from benchmarks.allocation.more_text import learn_on  # noqa: E402
from benchmarks.allocation.relearn import relearn  # noqa: E402
from benchmarks.allocation.report import JUDGED, MORE, UNIFORM_3, write_report  # noqa: E402
from benchmarks.allocation.rivals import evolutionary_search, gradient_search, head_and_tail  # noqa: E402

METHODS.update(fisher=learn_fisher, deltaloss=learn_deltaloss)

BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5)
SEQUENCES, FEWER_SEQUENCES, LENGTH, SEED = 48, 16, 256, 0
HELD_OUT = (64, 16)
SEARCH_BITS, SEARCH_SECONDS, REFINE_SECONDS = (2.5, 3.0, 3.5), 240.0, 40.0
MORE_TEXT = 4
RELAXED_BITS, ANEW_BITS = 3.0, (2.25, 4.0)
AUTOSCHEME = Path(__file__).with_name("autoscheme.json")


@dataclass(frozen=True)
class Setting:
    """One model and its candidates. judged: the claims are about it, so it has all methods and three times the text."""

    model: str
    folder: Path
    quantizer: str
    group_size: int

    @property
    def judged(self) -> bool:
        return self.name == JUDGED

    @property
    def sequences(self) -> int:
        return SEQUENCES if self.judged else FEWER_SEQUENCES

    @property
    def name(self) -> str:
        return f"{self.model}-{self.quantizer}-g{self.group_size}"


def settings(shared: Path) -> list[Setting]:
    """ref-7m with gptq and group 128 first: what the claims are about."""
    reference, demo = shared / "models" / "ref-7m", ROOT / "benchmarks" / "demo" / "model"
    models = [("ref-7m", reference)] if reference.is_dir() else []
    models.append(("demo", demo))
    return [
        Setting(name, folder, quantizer, group)
        for name, folder in models
        for quantizer, group in (("gptq", 128), ("gptq", 64), ("rtn", 128), ("rtn", 64))
    ]


def texts(shared: Path, work: Path) -> tuple[list[Path], list[Path]] | None:
    """Files to calibrate on (books, web pages, articles; parts of training splits) and to report on (other splits)."""
    folder = shared / "text"
    if not folder.is_dir():
        return None
    cut = work / "calibration.txt"
    if not cut.exists():
        books = lzma.decompress((folder / "books.train.txt.xz").read_bytes()).decode()
        pieces = [books[i : i + 4000] for i in range(0, len(books), len(books) // 300)]
        web, articles = ((folder / f"{name}.calib.txt").read_text()[:600_000] for name in ("c4", "wiki"))
        write_atomically(cut, "\n".join([*pieces, web, articles]))
    return [cut], [folder / "books.valid.txt", folder / "wikitext2.valid.raw"]


def check_that_scores_fall(scores: Scores) -> None:
    """Whatever the method, wider candidates must cost less in all."""
    totals: dict[int, float] = {}
    for module in scores.modules.values():
        for c in module.candidates if len(module.candidates) > 1 else []:
            totals[c.format.num_bits] = totals.get(c.format.num_bits, 0.0) + c.score
    by_width = [totals[bits] for bits in sorted(totals)]
    assert by_width == sorted(by_width, reverse=True), (scores.method, totals)


class Bench:
    """The cells of one setting."""

    def __init__(self, setting: Setting, work: Path, shared: Path) -> None:
        self.setting = setting
        self.work = work / setting.name
        self.work.mkdir(parents=True, exist_ok=True)
        files = texts(shared, work)
        self.candidates = CandidateSettings(
            quantizer=setting.quantizer,
            group_size=setting.group_size,
            calibration=None if files is None else files[0],
            sequences=setting.sequences,
            sequence_length=LENGTH,
            seed=SEED,
        )
        learn(setting.folder, self.work, self.candidates, LearningSettings(method="uniform"))
        if files is None:
            calibration = calibration_from_model(setting.folder, setting.sequences, LENGTH, SEED).token_ids
            held_out = [calibration_from_model(setting.folder, HELD_OUT[0], LENGTH, SEED + 1).token_ids]
        else:
            calibration = calibration_from_text(setting.folder, files[0], setting.sequences, LENGTH, SEED).token_ids
            held_out = [
                calibration_from_text(setting.folder, [file], count, LENGTH, SEED).token_ids
                for file, count in zip(files[1], HELD_OUT, strict=True)
            ]
        self.lab = Laboratory(setting.folder, self.work / "bank", calibration, held_out)
        self.files = None if files is None else files[0]

    def scores(self, method: str, training_bits: float = RELAXED_BITS) -> tuple[Scores, float]:
        """Scores by the product's own command and the CPU seconds it took, candidates not counted."""
        name = method if training_bits == RELAXED_BITS else f"{method}-{training_bits}"
        kept, record = self.work / f"scores-{name}.json", self.work / f"scores-{name}.seconds"
        if not record.exists():
            settings = LearningSettings(method=method, average_bits=training_bits, seed=SEED)
            start = time.process_time()
            result = learn(self.setting.folder, self.work, self.candidates, settings)
            seconds = time.process_time() - start
            check_that_scores_fall(result.scores)
            result.scores.write(kept)
            record.write_text(str(seconds))
        return Scores.read(kept), float(record.read_text())

    def cell(self, method: str, bits: float, plan: Callable[[], list[int]], learning_seconds: float = 0.0) -> list[int]:
        """The plan of one cell, from WORK or made and measured now."""
        path = self.path(method, bits)
        if path.exists():
            return [int(b) for b in json.loads(path.read_text())["plan"]]
        start = time.process_time()
        found = plan()
        seconds = time.process_time() - start
        spent, budget = self.lab.nbytes(found), self.lab.budget(bits)
        assert spent <= budget, (method, bits, spent, budget)
        record: dict[str, Any] = {
            "method": method, "bits": bits, "plan": found, "nbytes": spent, "budget_bytes": budget,
            "learning_seconds": learning_seconds, "seconds": seconds,
        }  # fmt: skip
        record["held_out"] = self.known(found) or [
            {"kl": losses.kl.tolist(), "nll": losses.nll.tolist()} for losses in self.lab.report(found)
        ]
        write_atomically(path, json.dumps(record))
        print(f"{self.setting.name} {method} {bits}: KL {torch.tensor(record['held_out'][0]['kl']).mean():.5f}, "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
        return found

    def known(self, plan: list[int]) -> list[dict[str, Any]] | None:
        """The losses on held-out text of a cell that has the same plan, if there is one."""
        for path in self.work.glob("*-[0-9]*.json"):
            cell: dict[str, Any] = json.loads(path.read_text())
            if cell.get("plan") == plan and "held_out" in cell:
                losses: list[dict[str, Any]] = cell["held_out"]
                return losses
        return None

    def run(self, rows: Sequence[str]) -> None:
        """Those of ROWS that this setting has, at every budget that its candidates allow."""
        budgets = [bits for bits in BITS if self.lab.feasible(bits)]
        for row in rows:
            if row in EVERYWHERE or self.setting.judged:
                ROWS[row](self, budgets)

    def uniform(self, budgets: Sequence[float]) -> None:
        lab = self.lab
        for bits in budgets:
            self.cell("uniform", bits, lambda bits=bits: lab.uniform(bits))
            self.cell("head and tail", bits, lambda bits=bits: head_and_tail(lab, bits))
        three = [3] * len(lab.names)
        self.cell(UNIFORM_3, round(8 * lab.nbytes(three) / lab.parameters + 5e-5, 4), lambda: three)

    def block_errors(self, budgets: Sequence[float]) -> None:
        start = time.process_time()
        missing = any(not self.path(method, bits).exists() for method in WEIGHTINGS for bits in budgets)
        tables = block_error_tables(self.lab) if missing else {}
        each = (time.process_time() - start) / len(WEIGHTINGS)
        for method in WEIGHTINGS:
            for bits in budgets:
                self.cell(method, bits, lambda m=method, b=bits: self.lab.solve(tables[m], b), each)

    def path(self, method: str, bits: float) -> Path:
        return self.work / f"{method}-{bits}.json".replace(" ", "_")

    def learned(self, method: str, budgets: Sequence[float]) -> None:
        scores, seconds = self.scores(method)
        for bits in budgets:
            self.cell(method, bits, lambda bits=bits: self.lab.solve_scores(scores, bits), seconds)
            if method == "gamma":
                alone = partial(self.lab.solve, self.lab.table(scores), bits)
                self.cell("gamma, singles", bits, alone, seconds)

    def relaxed_anew(self, _: Sequence[float]) -> None:
        for bits in ANEW_BITS:
            scores, seconds = self.scores("relaxed", bits)
            self.cell("relaxed anew", bits, partial(self.lab.solve_scores, scores, bits), seconds)

    def more_text(self, budgets: Sequence[float]) -> None:
        """Scores of `gamma` from as much text as takes the time of `measured`, which has a quarter of it."""
        if self.files is None:
            return
        kept, record = self.work / "scores-gamma-more-text.json", self.work / "scores-gamma-more-text.seconds"
        if not record.exists():
            count = MORE_TEXT * self.setting.sequences
            tokens = calibration_from_text(self.setting.folder, self.files, count, LENGTH, SEED).token_ids
            start = time.process_time()
            learn_on(self.lab, tokens, LearningSettings(seed=SEED)).write(kept)
            record.write_text(str(time.process_time() - start))
        scores, seconds = Scores.read(kept), float(record.read_text())
        for bits in budgets:
            self.cell(MORE, bits, partial(self.lab.solve_scores, scores, bits), seconds)

    def autoscheme(self, _: Sequence[float]) -> None:
        chosen = json.loads(AUTOSCHEME.read_text()) if AUTOSCHEME.exists() else {"setting": None}
        if chosen["setting"] == self.setting.name:
            for bits, digits in chosen["widths"].items():
                of_module = dict(zip(chosen["modules"], map(int, digits), strict=True))
                widths = [of_module[name] for name in self.lab.names]
                seconds = sum(chosen["seconds"].values())
                self.cell(f"AutoScheme {chosen['auto_round']}", float(bits), lambda w=widths: w, seconds)

    def gamma_starts(self, budgets: Sequence[float]) -> Iterator[tuple[float, Scores, list[int], float]]:
        """By budget the scores of gamma, their plan, and the CPU seconds that learning took."""
        scores, seconds = self.scores("gamma")
        for bits in budgets:
            yield bits, scores, self.cell("gamma", bits, partial(self.lab.solve_scores, scores, bits), seconds), seconds

    def gamma_relearned(self, budgets: Sequence[float]) -> None:
        for bits, scores, start, seconds in self.gamma_starts(budgets):
            self.cell("gamma relearned", bits, partial(relearn, self.lab, scores, start, bits), seconds)

    def gamma_refined(self, budgets: Sequence[float]) -> None:
        for bits, scores, start, seconds in self.gamma_starts(budgets):
            self.cell("gamma refined", bits, partial(self.refined, scores, start, bits), seconds)

    def evolutionary(self, _: Sequence[float]) -> None:
        for bits in SEARCH_BITS:
            search = partial(evolutionary_search, self.lab, bits, SEARCH_SECONDS)
            self.cell("evolutionary search", bits, search)

    def gradient(self, _: Sequence[float]) -> None:
        for bits in SEARCH_BITS:
            self.cell("gradient search", bits, partial(gradient_search, self.lab, bits, SEARCH_SECONDS, sequences=8))

    def refined(self, scores: Scores, start: list[int], bits: float) -> list[int]:
        lab = self.lab
        solvable = lab.linears_only(scores)
        settings = RefineSettings(lab.budget(bits), REFINE_SECONDS, seed=SEED, clock=time.process_time)
        found = refine(lab.calibration, solvable, lab.assignment(start), settings)
        return [found.assignment[name].num_bits for name in lab.names]


def _learned(method: str) -> Callable[[Bench, Sequence[float]], None]:
    return lambda bench, budgets: bench.learned(method, budgets)


ROWS: dict[str, Callable[[Bench, Sequence[float]], None]] = {
    "uniform": Bench.uniform,
    **{method: _learned(method) for method in ("fisher", "deltaloss", "relaxed", "gamma")},
    "gamma-more-text": Bench.more_text,
    "autoscheme": Bench.autoscheme,
    "block-errors": Bench.block_errors,
    "relaxed-anew": Bench.relaxed_anew,
    "gamma-relearned": Bench.gamma_relearned,
    "gamma-refined": Bench.gamma_refined,
    "measured": _learned("measured"),
    "gradient": Bench.gradient,
    "evolutionary": Bench.evolutionary,
}
EVERYWHERE = ("uniform", "fisher", "deltaloss", "relaxed", "gamma", "measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-out/allocation"), help="folder for the cells")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="models/ and text/")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="only these, in this order")
    parser.add_argument("--settings", nargs="+", help="only these, e.g. ref-7m-gptq-g128")
    report = parser.add_mutually_exclusive_group()
    report.add_argument("--report", action="store_true", help="only write the result from the cells that there are")
    report.add_argument("--no-report", action="store_true", help="only fill cells")
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    chosen = settings(args.shared)
    if not args.report:
        for setting in chosen:
            if args.settings is None or setting.name in args.settings:
                Bench(setting, args.work, args.shared).run(args.rows)
    if not args.no_report:
        write_report(args.work, [s.name for s in chosen], BITS, SEED, ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()
