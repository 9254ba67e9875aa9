"""What the result says follows from the rows: claims, comparisons at equal bytes, the table of the README."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from allocator.contract.packing import pack_codes
from benchmarks.real_models.cells import Bench, Quantized
from benchmarks.real_models.losses import TokenLosses
from benchmarks.real_models.process import NO_COST, Cost
from benchmarks.real_models.programs import measured, unpacked
from benchmarks.real_models.report import claims_of, comparisons, not_measured, table, write_table
from benchmarks.real_models.sizes import Sizes
from benchmarks.real_models.texts import Text

MODEL = SimpleNamespace(name="tiny", title="Tiny", tied=False)


def row(name: str, kl: float, **more: Any) -> dict[str, Any]:
    figures = {"kl": kl, "top1": 0.5, "perplexity": 123.4}
    return {"model": "tiny", "row": name, "tensor_bytes": 2_500_000, "WikiText-2": figures, "chat": figures} | more


@pytest.fixture
def bench(tiny_model: Callable[[str], Path], tmp_path: Path) -> Bench:
    found = Bench(MODEL, tiny_model("llama"), tmp_path, tmp_path / "none", 2, 16)  # type: ignore[arg-type]
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    found.__dict__["texts"] = [Text("WikiText-2", tokens), Text("chat", tokens + 1)]
    return found


def test_a_cell_is_measured_once_and_again_when_its_text_or_source_is_another(bench: Bench) -> None:
    made = []

    def make() -> Quantized:
        made.append(1)
        return Quantized(bench.load(bench.folder), Sizes(3, 2, 1, 8.0), NO_COST, {"rival": "itself"})

    first = bench.cell("as it is", make, "bank a")
    assert first["WikiText-2"]["kl"] == pytest.approx(0, abs=1e-6)
    assert (first["file_bytes"], first["tensor_bytes"], first["rival"]) == (3, 2, "itself")
    assert bench.cell("as it is", make, "bank a") == first
    assert len(made) == 1
    bench.cell("as it is", make, "bank b")
    assert len(made) == 2
    bench.__dict__["texts"] = [Text("WikiText-2", bench.texts[0].token_ids + 1), bench.texts[1]]
    bench.__dict__.pop("references")
    bench.cell("as it is", make, "bank b")
    assert len(made) == 3
    assert [r["row"] for r in bench.rows()] == ["as it is"]


class CountedTasks:
    """Stands for lm-eval, which is no part of this environment."""

    def __init__(self, documents: int) -> None:
        self.documents = documents

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {"LAMBADA": {"documents": self.documents, "accuracy": 0.3, "accuracy_error": 0.01}}


def test_a_row_has_tasks_where_it_asks_for_them_and_a_run_without_them_leaves_them(bench: Bench) -> None:
    def measured(documents: int, name: str = "main", with_tasks: bool = True) -> dict[str, Any]:
        bench._tasks = CountedTasks(documents) if documents else None  # type: ignore[assignment]
        bench.__dict__["tokenizer"] = None
        make = lambda: Quantized(bench.load(bench.folder), Sizes(3, 2, 1, 8.0), NO_COST)  # noqa: E731
        return bench.cell(name, make, with_tasks=with_tasks)

    assert "LAMBADA" not in measured(0)
    assert measured(20)["LAMBADA"]["documents"] == 20
    assert measured(0)["LAMBADA"]["documents"] == 20
    assert measured(30)["LAMBADA"]["documents"] == 30
    assert "LAMBADA" not in measured(30, "at the bytes of a rival", with_tasks=False)


def test_only_wanted_rows_are_made(bench: Bench) -> None:
    only = Bench(MODEL, bench.folder, bench.work, bench.work, 2, 16, patterns=["AutoRound W?"])  # type: ignore[arg-type]
    assert only.wants("AutoRound W2")
    assert not only.may_want("gamma"), "nothing has to be learned for it"
    assert bench.may_want("gamma")
    assert only.cell("AutoRound AutoScheme 2.5", lambda: pytest.fail("made")) == {}
    assert only.rows() == []


def test_rows_are_compared_with_what_has_their_bytes(bench: Bench) -> None:
    kl = np.ones((2, 15))
    kept = [
        row("gamma 2.5", 0.5, bits=2.5, widest_uniform="uniform 2"),
        row("gamma at the bytes of llama.cpp Q2_K", 0.6, beside="llama.cpp Q2_K"),
        row("uniform 2", 1.0, rival="uniform gptq"),
        row("llama.cpp Q2_K", 0.3, rival="llama.cpp"),
        row("gamma 2.25", 2.0, bits=2.25, widest_uniform=None),
    ]
    for entry in kept:
        entry["texts"] = {"WikiText-2": "a", "chat": "b"}
        bench.path(entry["row"]).write_text(json.dumps(entry))
        for text in entry["texts"]:
            losses = TokenLosses(kl * entry[text]["kl"], kl, kl > 0)
            losses.save(bench.losses_path(entry["row"], text))
    found = {(c["row"], c["against"], c["text"]): c for c in comparisons(bench)}
    assert len(found) == 4
    against = found["gamma 2.5", "uniform 2", "chat"]
    assert (against["ratio"], against["interval"]) == (0.5, [0.5, 0.5])
    assert found["gamma at the bytes of llama.cpp Q2_K", "llama.cpp Q2_K", "WikiText-2"]["ratio"] == 2.0


def compared(name: str, against: str, ratio: float) -> dict[str, Any]:
    return {"model": "tiny", "row": name, "against": against, "text": "WikiText-2", "ratio": ratio}


def test_claims_are_of_what_was_measured_and_say_when_they_do_not_hold() -> None:
    assert claims_of([row("uniform 3", 1.0)], []) == []
    rows = [row("gamma 2.5", 1.2), row("uniform 3", 1.0)]
    found = claims_of(rows, [compared("gamma 2.5", "uniform 2", 0.4), compared("gamma 3.0", "uniform 2", 0.3)])
    assert [(c["value"], c["holds"]) for c in found] == [(0.4, True), (1.2, False)]
    found = claims_of(rows[:1], [
        compared("gamma at the bytes of llama.cpp Q4_K_M", "llama.cpp Q4_K_M", 1.1),
        compared("gamma at the bytes of llama.cpp Q2_K", "llama.cpp Q2_K", 9.0),
        compared("gamma at the bytes of uniform 3", "uniform 3", 9.0),
        compared("gamma at the bytes of AutoRound AutoScheme 2.5", "AutoRound AutoScheme 2.5", 0.5),
        compared("gamma at the bytes of AutoRound AutoScheme 3.0", "AutoRound AutoScheme 3.0", 0.7),
    ])  # fmt: skip
    assert [(c["value"], c["holds"]) for c in found] == [(0.6, True), (1.1, False)]


def test_learned_candidates_have_claims_of_their_own() -> None:
    learned = ", learned candidates"
    rows = [row("gamma 2.5", 1.2), row("gamma 4.0", 0.2), row("gamma 4.5", 0.1), row("uniform 3", 1.0)]
    rows += [row(f"gamma 2.5{learned}", 0.6), row(f"gamma 4.0{learned}", 0.18), row(f"gamma 4.5{learned}", 0.11)]
    rows += [row("uniform 3, vocabulary at 8", 0.8), row(f"gamma 2.5, vocabulary at 8{learned}", 0.4)]
    found = claims_of(rows, [
        compared("gamma 2.5", "uniform 2", 0.4),
        compared(f"gamma 2.5{learned}", f"uniform 2{learned}", 0.7),
        compared("gamma at the bytes of llama.cpp Q3_K_M", "llama.cpp Q3_K_M", 1.5),
        compared(f"gamma at the bytes of llama.cpp Q3_K_M{learned}", "llama.cpp Q3_K_M", 1.1),
        compared(f"gamma at the bytes of llama.cpp Q4_K_M{learned}", "llama.cpp Q4_K_M", 1.2),
    ])  # fmt: skip
    of_gptq = [(c["value"], c["holds"]) for c in found if learned not in c["claim"]]
    assert of_gptq == [(0.4, True), (1.5, False), (1.2, False)]
    of_learned = [(c["value"], c["limit"], c["holds"]) for c in found if f"tiny{learned}" in c["claim"]]
    assert of_learned == [
        (0.7, "< 1", True),
        (1.2, "< 1", False),
        (0.6, "<= 0.5", False),
        (0.5, "<= 0.5", True),
        (0.9, "< 1", True),
        (1.1, "< 1", False),
    ]
    (gain,) = [c for c in found if "over that with gptq's candidates" in c["claim"]]
    assert (gain["value"], gain["holds"]) == (0.9, True), "4.5 bits are above what is claimed"
    assert "(2.5: 0.5, 4.0: 0.9)" in gain["claim"]


def test_what_was_not_measured_is_named() -> None:
    rows = [row("gamma 2.5", 1.0) | {"model": "smollm2"}, row("llama.cpp Q2_K", 1.0) | {"model": "smollm2"}]
    missing = not_measured(rows, [2.5, 3.0])
    assert missing["gemma3"] == "nothing yet"
    assert {"gamma 3.0", "gamma 3.0, tuned", "AutoRound W2"} <= set(missing["smollm2"])
    assert set(missing["smollm2, LAMBADA and BLiMP"]) == {"gamma 2.5", "llama.cpp Q2_K"}
    assert not {"gamma 2.5", "llama.cpp Q2_K"} & set(missing["smollm2"])


def test_the_table_has_every_plan_and_beside_a_rival_what_gamma_loses_at_its_bytes(tmp_path: Path) -> None:
    accuracy = {"documents": 200, "accuracy": 0.25, "accuracy_error": 0.011}
    rows = [
        row("llama.cpp Q2_K", 0.3, tensor_bytes=2_600_000),
        row("gamma 2.5", 0.5, LAMBADA=accuracy, BLiMP=accuracy),
        row("gamma at the bytes of llama.cpp Q2_K", 0.25, beside="llama.cpp Q2_K"),
        row("uniform 3, learned candidates", 0.2, tensor_bytes=2_700_000),
    ]
    text = table(rows, {"tiny": "Tiny"})
    assert text.splitlines()[2:5] == [
        "| Tiny: **GAMMA, 2.5 bits** | 2.5 | 0.500 | 50.0 % | 123 |  |  |",
        "| Tiny: llama.cpp Q2_K | 2.6 | 0.300 | 50.0 % | 123 | 0.250 | 50.0 % |",
        "| Tiny: uniform, 3 bits, learned candidates | 2.7 | 0.200 | 50.0 % | 123 |  |  |",
    ]
    assert text.splitlines()[-1] == "| Tiny: **GAMMA, 2.5 bits** | 2.5 | 25.0 ± 1.1 % | 25.0 ± 1.1 % |"
    rows.append(row("gamma at the bytes of llama.cpp Q2_K, learned candidates", 0.2, beside="llama.cpp Q2_K"))
    assert "| 123 | 0.250 | 50.0 % | 0.200 | 50.0 % |" in table(rows, {"tiny": "Tiny"})
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- real models -->\nold\n<!-- end of real models -->\nafter\n")
    write_table(page, text)
    write_table(page, text)
    assert page.read_text() == f"before\n<!-- real models -->\n{text}<!-- end of real models -->\nafter\n"


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_checkpoints_of_autoround_are_read_as_their_codes_say(tmp_path: Path, num_bits: int) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**num_bits, (32, 64), generator=generator)
    zeros = torch.randint(2**num_bits, (32, 2), generator=generator)
    scales = torch.rand(32, 2, generator=generator).half()
    stored = {"up.qweight": pack_codes(codes, num_bits).T.contiguous(), "up.scales": scales.T.contiguous()}
    stored |= {"up.qzeros": pack_codes(zeros.T.contiguous(), num_bits), "norm.weight": torch.ones(4).bfloat16()}
    save_file(stored, tmp_path / "model.safetensors")
    found = dict(unpacked(tmp_path))
    group = torch.arange(64) // 32
    later = dict(unpacked(tmp_path, zero_offset=1))["up.weight"]
    torch.testing.assert_close(later, (codes - zeros[:, group] - 1) * scales.float()[:, group])
    torch.testing.assert_close(found["up.weight"], (codes - zeros[:, group]) * scales.float()[:, group])
    assert torch.equal(found["norm.weight"], torch.ones(4))


def test_what_another_program_wrote_is_kept_and_made_again_for_other_settings(bench: Bench) -> None:
    from safetensors.torch import save_file

    made: list[dict[str, Any]] = []

    def quantize(arguments: list[str]) -> Cost:
        model, tokens, out, settings = map(Path, arguments)
        assert model == bench.folder
        assert tokens.is_file()
        made.append(json.loads(settings.read_text()))
        (out / "named by it").mkdir(parents=True)
        (out / "named by it" / "config.json").write_text("{}")
        norm = {"model.norm.weight": torch.zeros(64)}
        save_file(norm, out / "named by it" / "model.safetensors")
        return Cost(12.0, 1.0)

    tokens = torch.zeros(2, 16, dtype=torch.int64)
    for _ in range(2):
        measured(bench, "AutoRound", "AutoRound W2", tokens, {"widths": [2], "iters": 200}, quantize)
        bench.path("AutoRound W2").unlink()
    assert made == [{"widths": [2], "iters": 200}], "an hour's work is not done twice"
    measured(bench, "AutoRound", "AutoRound W2", tokens, {"widths": [2], "iters": 2}, quantize)
    (row,) = bench.rows()
    assert (row["iters"], row["rival"], row["cpu_seconds"]) == (2, "AutoRound", 12.0)
    assert row["WikiText-2"]["kl"] > 0.01, "its weights were measured"
