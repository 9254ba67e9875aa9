"""Which cuts of modules would pay: along N as the channels come, sorted by loss, and along K; equal bytes.

The score of a piece at a width is the loss that its rounding error alone causes, in nats a token: its error at the
module's output, taken along the gradients of the model's own log-likelihood there (the objective of stage I, to first
order inside the block). Scores of all cuts come from the same pass over the same candidates, and the exact program
gives each the same bytes; the KL divergence from the original is then measured on held-out text.

"sorted" cuts every module after its output channels were put in the order of their loss at 3 bits. That is a bound and
no proposal: the next module would have to take its inputs in that order. Where it can, in the MLP, it is built, and
measured by `product.py`.
"""

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model, calibration_from_text
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.gradients import fill_gradients
from allocator.blocks.hidden_states import HiddenStates
from allocator.contract.bank import ModelReference
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.evaluate import measure_divergence
from allocator.model import CandidateFormats, model_digest, read_inventory
from allocator.quantize import BankReader, build_bank, get_quantizer
from allocator.solve import SearchLimits, solve

__all__ = ["CUTS", "scan"]

WIDTHS = (2, 3, 4, 5, 6, 8)
BUDGETS = (2.5, 3.0, 3.5, 4.0)
GROUP, DRAWS, SEQUENCES, LENGTH, SEED = 64, 4, 16, 256, 0


@dataclass(frozen=True)
class Piece:
    """Some rows (or columns) of a module."""

    module: str
    rows: Tensor
    columns: slice | None = None


class Pieces:
    """The cuts: name -> function from (module, losses of its rows at 3 bits `[N]`, K) to its pieces."""

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
    def columns_64(name: str, order: Tensor, columns: int) -> Iterator[Piece]:
        for start in range(0, columns, 64):
            yield Piece(name, torch.arange(len(order)), slice(start, start + 64))


CUTS = {
    "module": Pieces.whole,
    "blocks of 128 rows": Pieces.natural_128,
    "blocks of 128 rows, sorted": Pieces.sorted_128,
    "blocks of 64 columns": Pieces.columns_64,
}


def record(block: nn.Module, names: list[str], kept: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Keep input and output of the linear modules `names` of `block` whenever they run."""
    for name in names:

        def keep(_module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            kept[name] = (inputs[0].detach(), output)

        block.get_submodule(name).register_forward_hook(keep)


def measure(stream: BlockStream, bank: BankReader, hidden: HiddenStates, gradients: list[HiddenStates]) -> Any:
    """Cut -> list of (piece, losses by width), and the errors of the candidates are read once for all."""
    found: dict[str, list[tuple[Piece, list[float]]]] = {name: [] for name in CUTS}
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
        for name in names:
            inputs, errors = kept[name][0].flatten(0, 1), errors_of[name]
            slope = torch.stack(slopes[name])  # [draws, tokens, N]
            weight = block.get_parameter(f"{name}.weight").data
            # [tokens, N]: the error of each output channel.
            of_rows = [inputs @ error.T for error in errors]
            for cut, pieces_of in CUTS.items():
                for piece in pieces_of(prefix + name, order_of[name], weight.shape[1]):
                    losses = []
                    for error, by_row in zip(errors, of_rows, strict=True):
                        if piece.columns is None:
                            along = (slope[..., piece.rows] * by_row[:, piece.rows]).sum(-1)
                        else:
                            part = inputs[:, piece.columns] @ error[:, piece.columns].T
                            along = (slope * part).sum(-1)
                        losses.append(float(along.double().square().mean() / 2))
                    found[cut].append((piece, [*losses, 0.0]))
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
    solution = solve(scores, budget, limits=SearchLimits(relative_gap=1e-6))
    widths = [solution.assignment[f"p{n}"].num_bits for n in range(len(pieces))]
    return widths, solution.tensor_bytes - constant * len(pieces)


def scan(name: str, folder: Path, quantizer: str, text: Path | None, work: Path) -> list[dict[str, Any]]:
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
    run = CalibrationRun(stream, calibration, hidden)
    build_bank(run, reference, get_quantizer(quantizer), CandidateFormats(WIDTHS, GROUP), work / "bank")
    gradients = [hidden.beside(f"gradients-{i}") for i in range(DRAWS)]
    fill_gradients(stream, hidden, gradients, SEED)
    bank = BankReader(work / "bank")
    found = measure(stream, bank, hidden, gradients)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows, of_whole = [], 1.0
    for bits in BUDGETS:
        for cut, pieces in found.items():
            if cut == "blocks of 64 columns" and quantizer == "gptq":
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
            if cut == "module":
                of_whole = kl
            rows.append({
                "model": name, "quantizer": quantizer, "bits": bits, "granularity": cut,
                "pieces": len(pieces), "nbytes": nbytes, "kl": kl, "kl_by_whole_modules": kl / of_whole,
            })  # fmt: skip
            print(f"  {name} {quantizer} {bits} {cut}: KL {kl:.4f}, {nbytes:,} bytes", flush=True)
    return rows
