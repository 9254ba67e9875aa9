"""What is learned of a block is better than what it was begun with, is what a server computes, and survives a kill."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import Calibration
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.hidden_states import HiddenStates
from allocator.contract.bank import Bank, ModelReference
from allocator.contract.errors import InputError, StoppedError
from allocator.evaluate import Student
from allocator.model import CandidateFormats, model_digest, read_inventory
from allocator.quantize import BankReader, build_bank, get_quantizer
from allocator.run.journal import Journal

SEQUENCES, LENGTH = 32, 48
LEARNED = "learned-rounding:iterations=120,learning_rate=0.01,up_to_bits=2"
BRIEFLY = "learned-rounding:iterations=4,up_to_bits=3"
FORMATS = CandidateFormats((2, 3), 32)


def text(seed: int) -> torch.Tensor:
    """Of few words, so that little text says much about other text."""
    return torch.randint(1, 13, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(seed))


def build(
    model: Path, work: Path, spec: str, journal: Journal | None = None, formats: CandidateFormats = FORMATS
) -> Bank:
    inventory = read_inventory(model)
    hidden = HiddenStates(work / "hidden", SEQUENCES, LENGTH, inventory.config["hidden_size"])
    run = CalibrationRun(
        BlockStream(inventory), Calibration(text(0), "chance"), hidden, journal=journal or Journal.nowhere()
    )
    reference = ModelReference(name="m", architecture=inventory.architecture, digest=model_digest(inventory))
    return build_bank(run, reference, get_quantizer(spec), formats, work / "bank")


def uniform_kl(model: Path, work: Path, num_bits: int) -> float:
    """On text that nothing was learned on."""
    stream, bank = BlockStream(read_inventory(model)), BankReader(work / "bank")
    blocks = [m.name for m in stream.inventory.modules if m.block is not None and m.name in bank.bank.modules]
    plan = {name: next(f for f in bank.formats(name) if f.num_bits == num_bits) for name in blocks}
    return float(Student(stream, bank, text(1)).losses(plan).kl.mean())


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3"])
def test_candidates_are_better_and_wide_ones_as_they_were(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(kind)
    begun, learned = (build(model, tmp_path / spec[:4], spec) for spec in ("gptq", LEARNED))
    kls = [uniform_kl(model, tmp_path / folder, 2) for folder in ("lear", "gptq")]
    assert kls[0] < 0.95 * kls[1], kls
    readers = [BankReader(tmp_path / folder / "bank") for folder in ("gptq", "lear")]
    assert begun.modules.keys() == learned.modules.keys()
    changed = {
        (name, form.num_bits)
        for name in begun.modules
        for form in readers[0].formats(name)[:-1]
        if not torch.equal(*(reader.dequantized(name, form) for reader in readers))
    }
    assert changed
    # The embedding is gptq's in both, by gradients of other probes.
    of_blocks = {(name, num_bits) for name, num_bits in changed if name.startswith("model.layers.")}
    assert {num_bits for _, num_bits in of_blocks} == {2}, changed
    assert {name for name, _ in changed - of_blocks} <= {"model.embed_tokens"}, changed


def test_symmetric_candidates_have_no_zero_points(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, formats = tiny_model("llama"), CandidateFormats((2,), 32, symmetric=True)
    for spec in ("gptq", LEARNED):
        build(model, tmp_path / spec[:4], spec, formats=formats)
    assert uniform_kl(model, tmp_path / "lear", 2) < 0.9 * uniform_kl(model, tmp_path / "gptq", 2)


class Stopping(Journal):
    """Stops after so many steps, as SIGTERM does."""

    left = 0

    def section(self, name: str) -> Journal:
        found = Stopping(super().section(name).folder)
        found.root = self  # type: ignore[attr-defined]
        return found

    def save(self, step: str, state: object, may_stop: bool = True) -> None:
        super().save(step, state, may_stop)
        root = getattr(self, "root", self)
        root.left -= 1
        if root.left == 0:
            raise StoppedError("stopped")


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bytes(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    whole = build(model, tmp_path / "whole", BRIEFLY)
    (tmp_path / "parts").mkdir()
    for _ in range(60):
        journal = Stopping(tmp_path / "parts" / "journal")
        journal.left = 3
        try:
            parts = build(model, tmp_path / "parts", BRIEFLY, journal)
            break
        except StoppedError:
            continue
    assert parts == whole
    assert sorted(p.name for p in (tmp_path / "parts" / "bank").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole" / "bank").iterdir()
    )
    assert not list((tmp_path / "parts" / "hidden").glob("rounding-*"))


def test_the_log_says_what_each_block_has_gained(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        build(tiny_model("llama"), tmp_path, BRIEFLY)
    lines = [r.getMessage() for r in caplog.records if "nats a token" in r.getMessage()]
    assert [line.split(":")[0] for line in lines] == [
        f"model.layers.{block} at {bits} bits" for block in (1, 0) for bits in (2, 3)
    ]
    assert json.loads((tmp_path / "bank" / "bank.json").read_text())["quantizer"].startswith("learned-rounding:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("iterations=0", "whole number from 1 on"),
        ("batch=2.5", "whole number from 1 on"),
        ("learning_rate=1", "below 1"),
        ("own_share=1.1", "from 0 to 1"),
        ("damping=0", "must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_quantizer(f"learned-rounding:{settings}")
