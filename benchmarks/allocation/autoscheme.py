"""Lets the AutoScheme of the real `auto-round` choose widths, and keeps them beside the benchmark as plain numbers.

    python benchmarks/allocation/autoscheme.py MODEL --text calibration.txt

in an environment of its own that has `auto-round` (and this package); `make bench-allocation` itself only reads
autoscheme.json. AutoScheme rounds to the nearest, asymmetric, scores every width by its DeltaLoss and solves its own
program; it is asked for the average bits of the comparison, scales and zero points included. Where its choice is over
the exact bytes, it is asked again for 0.002 bits less.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import torch
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

from allocator.contract.documents import write_atomically
from allocator.contract.layout import ModuleFormat, module_bytes

BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5)
WIDTHS = (2, 3, 4, 5, 6, 8)
SEQUENCES, LENGTH, GROUP_SIZE = 48, 256, 128
KEPT = Path(__file__).with_name("autoscheme.json")


def samples(text: Path, folder: Path) -> Path:
    """Pieces of `text`, evenly spread, as the lines of JSON that auto-round reads."""
    whole = text.read_text()
    pieces = [whole[i : i + 8 * LENGTH] for i in range(0, len(whole), len(whole) // (2 * SEQUENCES))]
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


def choose(folder: Path, dataset: Path, bits: float) -> dict[str, int]:
    """The width of every block linear at `bits` average bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = str(folder)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    form = {"group_size": GROUP_SIZE, "sym": False, "data_type": "int", "act_bits": 16}
    options = [QuantizationScheme(bits=b, **form) for b in WIDTHS]
    scheme = AutoScheme(avg_bits=bits, options=options, nsamples=SEQUENCES, seqlen=LENGTH, device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = GenScheme(scheme, model, names, {}, str(dataset), "cpu", tokenizer).get_layer_config()
    return {name: int(chosen[name]["bits"]) for name in names}


def nbytes(plan: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(
        module_bytes(ModuleFormat(shape=shapes[n], num_bits=b, group_size=GROUP_SIZE, symmetric=False))
        for n, b in plan.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["AR_ALLOW_W8_ASYM"] = "1"
    source = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    shapes = {n: tuple(p.shape) for n, p in source.state_dict().items() if ".layers." in n and p.dim() == 2}
    shapes = {n.removesuffix(".weight"): (int(a), int(b)) for n, (a, b) in shapes.items()}
    parameters = sum(a * b for a, b in shapes.values())
    plans, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AR_AUTO_SCHEME_CACHE"] = folder  # scores are read once and serve every budget
        dataset = samples(args.text, Path(folder))
        for bits in BITS:
            budget, asked, begun = int(Fraction(repr(bits)) * parameters / 8), bits, time.process_time()
            while nbytes(plan := choose(args.model, dataset, asked), shapes) > budget:
                asked = round(asked - 0.002, 4)
                if asked < min(BITS) / 2:
                    raise SystemExit(f"{bits}: no plan of {budget} bytes, down to {asked} bits")
            plans[str(bits)] = "".join(str(plan[name]) for name in shapes)
            seconds[str(bits)] = round(time.process_time() - begun, 1)
            print(f"{bits}: asked for {asked}, {budget - nbytes(plan, shapes)} bytes left, {seconds[str(bits)]} CPU s")
    document = {
        "setting": f"{args.model.name}-gptq-g{GROUP_SIZE}",
        "auto_round": importlib.metadata.version("auto-round"),
        "torch": torch.__version__,
        "command": f"python benchmarks/allocation/autoscheme.py {args.model.name} --text calibration.txt",
        "seconds": seconds,
        "modules": list(shapes),
        "widths": plans,
    }
    write_atomically(KEPT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
