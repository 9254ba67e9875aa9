"""Do widths by channel block pay? Modules cut along N (for comparison, along K) against whole modules, equal bytes.

The score of a piece at a width is the loss that its rounding error alone causes, in nats a token: its error at the
module's output, taken along the gradients of the model's own log-likelihood there (the objective of stage I, to first
order inside the block). Scores of all granularities come from the same pass over the same candidates, and the exact
program gives each the same bytes; the KL divergence from the original is then measured on held-out text.

"sorted" cuts a module after its output channels were put in the order of their loss at 3 bits. For all modules that is
a bound and no proposal: the next module would have to take its inputs in that order. Inside an MLP it is exact and
free: gate_proj and up_proj in one common order, down_proj's columns in the same ("MLP ... sorted": gate and up are
cut, all other modules are whole; down_proj's candidates are left as they are).
"""

import argparse
import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from allocator.blocks import BlockStream, calibration_from_model, calibration_from_text  # noqa: E402
from allocator.blocks.gradients import fill_gradients  # noqa: E402
from allocator.blocks.hidden import HiddenStates  # noqa: E402
from allocator.candidates import BankReader, build_bank  # noqa: E402
from allocator.contract.bank import ModelReference  # noqa: E402
from allocator.contract.layout import ModuleFormat, module_bytes  # noqa: E402
from allocator.contract.scores import Candidate, ScoredModule, Scores  # noqa: E402
from allocator.evaluation import measure_divergence  # noqa: E402
from allocator.inventory import model_digest, read_inventory  # noqa: E402
from allocator.quantizers import get_quantizer  # noqa: E402
from allocator.solving import solve  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
WIDTHS = (2, 3, 4, 5, 6, 8)
BUDGETS = (2.5, 3.0, 3.5, 4.0)
GROUP, DRAWS, SEQUENCES, LENGTH, SEED = 64, 4, 16, 256, 0
PAYS = 0.95
"""The KL ratio below which a finer granularity would be worth a place in the product."""


@dataclass(frozen=True)
class Piece:
    """Some rows (or columns) of a module."""

    module: str
    rows: Tensor
    columns: slice | None = None


def _is_gated(name: str) -> bool:
    return name.endswith(("gate_proj", "up_proj"))


class Pieces:
    """The granularities: name -> function from (module, losses of its rows at 3 bits `[N]`, K) to its pieces.

    The losses of gate_proj and up_proj that `mlp_*` are given are the sum of both, so that both have one order.
    """

    @staticmethod
    def whole(name: str, order: Tensor, _columns: int) -> Iterator[Piece]:
        yield Piece(name, torch.arange(len(order)))

    @staticmethod
    def natural_128(name: str, order: Tensor, _columns: int) -> Iterator[Piece]:
        yield from (Piece(name, rows) for rows in torch.arange(len(order)).split(128))

    @staticmethod
    def sorted_128(name: str, order: Tensor, _columns: int) -> Iterator[Piece]:
        yield from (Piece(name, rows) for rows in order.argsort(descending=True).split(128))

    @staticmethod
    def sorted_32(name: str, order: Tensor, _columns: int) -> Iterator[Piece]:
        yield from (Piece(name, rows) for rows in order.argsort(descending=True).split(32))

    @staticmethod
    def mlp_128(name: str, order: Tensor, columns: int) -> Iterator[Piece]:
        yield from (Pieces.sorted_128 if _is_gated(name) else Pieces.whole)(name, order, columns)

    @staticmethod
    def mlp_32(name: str, order: Tensor, columns: int) -> Iterator[Piece]:
        yield from (Pieces.sorted_32 if _is_gated(name) else Pieces.whole)(name, order, columns)

    @staticmethod
    def columns_64(name: str, order: Tensor, columns: int) -> Iterator[Piece]:
        for start in range(0, columns, 64):
            yield Piece(name, torch.arange(len(order)), slice(start, start + 64))


GRANULARITIES = {
    "module": Pieces.whole,
    "blocks of 128 rows": Pieces.natural_128,
    "blocks of 128 rows, sorted": Pieces.sorted_128,
    "blocks of 32 rows, sorted": Pieces.sorted_32,
    "MLP blocks of 128 rows, sorted": Pieces.mlp_128,
    "MLP blocks of 32 rows, sorted": Pieces.mlp_32,
    "blocks of 64 columns": Pieces.columns_64,
}


def record(block: nn.Module, names: list[str], kept: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Keep input and output of the linear modules `names` of `block` whenever they run."""
    for name in names:

        def keep(_module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            kept[name] = (inputs[0].detach(), output)

        block.get_submodule(name).register_forward_hook(keep)


def measure(stream: BlockStream, bank: BankReader, hidden: HiddenStates, gradients: list[HiddenStates]) -> Any:
    """Granularity -> list of (piece, losses by width), and the errors of the candidates are read once for all."""
    found: dict[str, list[tuple[Piece, list[float]]]] = {name: [] for name in GRANULARITIES}
    for index in range(stream.blocks):
        prefix = stream.inventory.block_prefix(index)
        names = [m.name.removeprefix(prefix) for m in stream.inventory.modules if m.block == index]
        block, kept = stream.block(index), {}
        record(block, names, kept)
        states = hidden.boundary(index).clone().requires_grad_(True)
        output = stream.run(block, states)
        outputs = [kept[name][1] for name in names]
        slopes: dict[str, list[Tensor]] = {name: [] for name in names}
        for store in gradients:
            upstream = store.boundary(index + 1).float()
            for name, slope in zip(
                names, torch.autograd.grad(output, outputs, upstream, retain_graph=True), strict=True
            ):
                slopes[name].append(slope.flatten(0, 1))
        errors_of: dict[str, list[Tensor]] = {}
        order_of: dict[str, Tensor] = {}
        for name in names:
            weight = block.get_parameter(f"{name}.weight").data
            forms = bank.formats(prefix + name)[:-1]
            errors_of[name] = [bank.dequantized(prefix + name, f) - weight for f in forms]
            of_rows = kept[name][0].flatten(0, 1) @ errors_of[name][WIDTHS.index(3)].T
            order_of[name] = (torch.stack(slopes[name]) * of_rows).square().sum((0, 1))
        together = sum(order_of[name] for name in names if _is_gated(name))
        for name in names:
            inputs, errors = kept[name][0].flatten(0, 1), errors_of[name]
            slope = torch.stack(slopes[name])  # [draws, tokens, N]
            weight = block.get_parameter(f"{name}.weight").data
            # [tokens, N]: the error of each output channel.
            of_rows = [inputs @ error.T for error in errors]
            for granularity, cut in GRANULARITIES.items():
                joint = granularity.startswith("MLP") and _is_gated(name)
                for piece in cut(prefix + name, together if joint else order_of[name], weight.shape[1]):
                    losses = []
                    for error, by_row in zip(errors, of_rows, strict=True):
                        if piece.columns is None:
                            along = (slope[..., piece.rows] * by_row[:, piece.rows]).sum(-1)
                        else:
                            part = inputs[:, piece.columns] @ error[:, piece.columns].T
                            along = (slope * part).sum(-1)
                        losses.append(float(along.double().square().mean() / 2))
                    found[granularity].append((piece, [*losses, 0.0]))
        print(f"  block {index} measured", flush=True)
    return found


def solve_pieces(
    reference: ModelReference, pieces: list[tuple[Piece, list[float]]], bits: float, bank: BankReader
) -> Any:
    """Widths of the pieces for an average of `bits`, and the bytes they take (shapes of pieces are not stored)."""
    scored, weights, constant = {}, 0, 16
    for number, (piece, losses) in enumerate(pieces):
        source = bank.formats(piece.module)[0]
        columns = source.shape[1] if piece.columns is None else piece.columns.stop - piece.columns.start
        shape = (len(piece.rows), columns)
        weights += shape[0] * shape[1]
        formats = [ModuleFormat(shape=shape, num_bits=b, group_size=GROUP, symmetric=False) for b in WIDTHS]
        formats.append(ModuleFormat(shape=shape, num_bits=16))
        candidates = [
            Candidate(format=f, nbytes=module_bytes(f), score=s) for f, s in zip(formats, losses, strict=True)
        ]
        scored[f"p{number}"] = ScoredModule(candidates=candidates)
    scores = Scores(
        model=reference, bank_digest=bank.bank.digest, dtype=bank.bank.dtype, method="pieces", unit="nats", settings={},
        other_bytes=0, modules=scored,
    )  # fmt: skip
    # weight_shape, 16 bytes, stands once a module and not once a piece: pieces are given its bytes on top.
    budget = int(weights * bits / 8) + constant * len(pieces)
    solution = solve(scores, budget, relative_gap=1e-6)
    widths = [solution.assignment[f"p{n}"].num_bits for n in range(len(pieces))]
    return widths, solution.tensor_bytes - constant * len(pieces)


def run(name: str, folder: Path, quantizer: str, text: Path | None, work: Path) -> list[dict[str, Any]]:
    """The rows of one model and quantizer."""
    inventory = read_inventory(folder)
    if text is not None:
        calibrated = work / "calibration.txt"
        calibrated.write_text(lzma.decompress((text / "books.train.txt.xz").read_bytes()).decode()[:2_000_000])
        calibration = calibration_from_text(folder, [calibrated], SEQUENCES, LENGTH, SEED)
        held_out = calibration_from_text(folder, [text / "books.valid.txt"], 48, LENGTH, SEED).token_ids
    else:
        calibration = calibration_from_model(folder, SEQUENCES, LENGTH, SEED)
        held_out = calibration_from_model(folder, 48, LENGTH, SEED + 1).token_ids
    stream = BlockStream(inventory)
    hidden = HiddenStates(work / "hidden", SEQUENCES, LENGTH, inventory.config["hidden_size"])
    reference = ModelReference(name=name, architecture=inventory.architecture, digest=model_digest(inventory))
    build_bank(
        inventory, reference, stream, calibration, hidden, get_quantizer(quantizer), WIDTHS, GROUP, False, work / "bank"
    )
    gradients = [hidden.beside(f"gradients-{i}") for i in range(DRAWS)]
    fill_gradients(stream, hidden, gradients, SEED)
    bank = BankReader(work / "bank")
    found = measure(stream, bank, hidden, gradients)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for bits in BUDGETS:
        for granularity, pieces in found.items():
            if granularity == "blocks of 64 columns" and quantizer == "gptq":
                continue  # its columns make up for each other's errors at one width
            widths, nbytes = solve_pieces(reference, pieces, bits, bank)
            dequantized: dict[tuple[str, int], Tensor] = {}
            for (piece, _), width in zip(pieces, widths, strict=True):
                if width == 16:
                    source = original.get_parameter(f"{piece.module}.weight").data
                else:
                    key = (piece.module, width)
                    if key not in dequantized:
                        form = next(f for f in bank.formats(piece.module) if f.num_bits == width)
                        dequantized[key] = bank.dequantized(piece.module, form)
                    source = dequantized[key]
                columns = slice(None) if piece.columns is None else piece.columns
                student.get_parameter(f"{piece.module}.weight").data[piece.rows, columns] = source[piece.rows, columns]
            kl = measure_divergence(original, student, held_out).kl
            rows.append({
                "model": name, "quantizer": quantizer, "bits": bits, "granularity": granularity,
                "pieces": len(pieces), "nbytes": nbytes, "kl": kl,
            })  # fmt: skip
            print(f"  {name} {quantizer} {bits} {granularity}: KL {kl:.4f}, {nbytes:,} bytes", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one case, e.g. demo-gptq; its rows are kept for the call that has all")
    parser.add_argument("--partial", action="store_true", help="write the result of the cases that are done")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "channel-blocks")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, tuple[Path, Path | None]] = {"demo": (ROOT / "benchmarks" / "demo" / "model", None)}
    if (DATA / "models" / "ref-7m").is_dir():
        models["ref-7m"] = (DATA / "models" / "ref-7m", DATA / "text")
    rows, missing = [], []
    for name, (folder, text) in models.items():
        for quantizer in ("gptq", "rtn"):
            case = f"{name}-{quantizer}"
            saved = args.folder / f"{case}.json"
            if not saved.exists() and args.only in (None, case):
                with tempfile.TemporaryDirectory() as work:
                    saved.write_text(json.dumps(run(name, folder, quantizer, text, Path(work))))
            if saved.exists():
                rows += json.loads(saved.read_text())
            else:
                missing.append(case)
    if missing:
        print("not done yet:", ", ".join(missing))
        if not args.partial:
            return
    claims = []
    whole = {(r["model"], r["quantizer"], r["bits"]): r["kl"] for r in rows if r["granularity"] == "module"}
    for granularity in list(GRANULARITIES)[1:]:
        for model in models:
            ratios = [
                r["kl"] / whole[r["model"], r["quantizer"], r["bits"]]
                for r in rows
                if r["granularity"] == granularity and r["model"] == model
            ]
            if not ratios:
                continue
            mean = float(torch.tensor(ratios).log().mean().exp())
            measured = sorted({r["quantizer"] for r in rows if r["model"] == model})
            text = f"{model}, {' and '.join(measured)}: {granularity}, KL over that of whole modules, mean over budgets"
            why = None if mean < PAYS else "channel blocks do not pay: module granularity stays"
            claims.append(claim(text, mean, f"< {PAYS} (pays)", mean < PAYS, why))
    for c in claims:
        print(c)
    command = "make bench-channel-blocks" + (f" (partial: without {', '.join(missing)})" if missing else "")
    print(write_result("channel_blocks", command, [SEED], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
