# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""The stream of weights that a bank gives for a manifest."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from functools import partial
from types import SimpleNamespace

from safetensors.torch import load_file, save_file
from vllm.model_executor.models.utils import WeightsMapper

from allocator.contract.channel_blocks import Parents
from allocator.contract.served_bank import ServedBank, open_served_bank
from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
from allocator.score import LearningSettings
from allocator.solve import Rules
from gamma_vllm.bank_loading import chosen
from gamma_vllm.weight_stream import StreamMapper
from tests.families import make_family
from tests.gamma_vllm.layers import declare


@pytest.fixture
def served(tmp_path):
    file = tmp_path / "a.q_proj.safetensors"
    save_file({f"w{b}.weight_packed": torch.full((2,), b) for b in (2, 3)}, file)
    modules = {"a.q_proj": declare(64, 64, 3), "a.k_proj": declare(64, 64, 16)}
    parents = Parents({name: module.shape for name, module in modules.items()}, None)
    manifest = SimpleNamespace(modules=modules, parents=parents)
    bank = SimpleNamespace(modules={"a.q_proj": SimpleNamespace(file=file.name)}, channel_order=None)
    return ServedBank(tmp_path, bank, manifest, frozenset({"lm_head.weight"}))


SOURCE = [(name, torch.zeros(1)) for name in ("a.q_proj.weight", "a.q_proj.bias", "a.k_proj.weight", "lm_head.weight")]
RENAME = WeightsMapper(orig_to_new_prefix={"a.": "language_model.a."})
DROP = WeightsMapper(orig_to_new_suffix={".bias": None})


@pytest.mark.parametrize("join", [lambda m: RENAME | m | DROP, lambda m: m | RENAME | DROP], ids=["right", "left"])
def test_candidates_take_the_place_of_weights_before_names_are_mapped(served, join):
    stream = dict(join(StreamMapper((partial(chosen, served),))).apply(iter(SOURCE)))
    assert set(stream) == {"language_model.a.q_proj.weight_packed", "language_model.a.k_proj.weight"}
    assert stream["language_model.a.q_proj.weight_packed"].tolist() == [3, 3]


def test_the_mapper_joins_in_place_as_vllm_joins_it(served):
    mapper = WeightsMapper()
    mapper |= StreamMapper((partial(chosen, served),)) | DROP
    mapper |= RENAME
    assert isinstance(mapper, StreamMapper)
    assert len(list(mapper.apply(iter(SOURCE)))) == 2


@pytest.mark.parametrize(
    ("family", "pins"),
    [
        ("granitemoe", {"*.experts.1.up_proj": 16, "*.experts.2.gate_proj": 3}),
        ("gpt_oss", {"*.experts.1.gate_up_proj": 16, "*.experts.2.down_proj": 16, "*.experts.3.*": 3}),
    ],
)
def test_experts_that_are_stored_together_stream_as_a_checkpoint_has_them(tmp_path, family, pins):
    model = make_family(family, tmp_path / "model")
    settings = CandidateSettings(quantizer="rtn", group_size=32, sequences=2, sequence_length=16, widths=(3, 5, 16))
    learned = learn(model, tmp_path / "work", settings, LearningSettings(draws=1))
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=6.5, rules=Rules(pins)))
    manifest.write(tmp_path / "manifest.json")
    export(manifest, model, learned.bank_folder, tmp_path / "gamma")
    served = open_served_bank(learned.bank_folder, tmp_path / "manifest.json")
    stream = dict(chosen(served, load_file(learned.bank_folder / "model.safetensors").items()))
    expected = load_file(tmp_path / "gamma" / "model.safetensors")
    assert stream.keys() == expected.keys()
    assert all(torch.equal(stream[name], tensor) for name, tensor in expected.items())
