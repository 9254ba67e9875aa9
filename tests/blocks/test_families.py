"""Every family runs block by block as transformers runs it whole, is learned, and its checkpoint is the model again."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from allocator.blocks import BlockStream
from allocator.blocks.hf_model import open_model
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.side_states import state_width
from allocator.blocks.tensors import read_rows, read_tensor
from allocator.evaluate import load_dequantized
from allocator.model import model_digest, read_inventory, read_shape
from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
from allocator.score import LearningSettings
from tests.families import FAMILIES, NOTHING_NEW, WRAPPERS, chosen, make_family, make_wrapper

STACKED = ("gate_proj", "up_proj", "down_proj")
CANDIDATES = CandidateSettings(quantizer="rtn", widths=(2, 4, 16), group_size=32, sequences=2, sequence_length=16)
LEARNING = LearningSettings(draws=2, batch_tokens=64)
LEARNED = chosen(family for family in FAMILIES if family != "phi")
RUN = [family for family in FAMILIES if family in LEARNED or family not in ("phi", *NOTHING_NEW)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_family(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return make


@pytest.mark.parametrize("name", RUN)
def test_block_by_block_the_logits_are_those_of_transformers(name: str, family, tmp_path: Path) -> None:
    inventory = read_inventory(family(name))
    assert not inventory.unknown
    assert inventory.parameters + sum(o.nbytes for o in inventory.others) // 2 == inventory.shape.parameters
    stream = BlockStream(inventory)
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    hidden = HiddenStates(tmp_path, 2, 40, state_width(inventory))
    stream.fill(hidden, tokens)
    model = AutoModelForCausalLM.from_pretrained(inventory.folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(tokens).logits
        torch.testing.assert_close(stream.head()(hidden.boundary(stream.blocks)), expected, rtol=1e-5, atol=1e-5)


def test_gradients_go_by_embeddings_of_each_block_and_by_shared_keys_too(family) -> None:
    inventory = read_inventory(family("gemma4_small"))
    stream, model = BlockStream(inventory), open_model(inventory.folder)
    tokens = torch.randint(0, 320, (2, 30), generator=torch.Generator().manual_seed(0))
    above = torch.randn(2, 30, 320, generator=torch.Generator().manual_seed(1))
    rows: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: rows.append(output))
    (expected,) = torch.autograd.grad(model(tokens).logits, rows, above)
    begin = states = stream.embed(tokens).requires_grad_(True)
    for index in range(stream.blocks):
        states = stream.run(stream.block(index), states)
    (found,) = torch.autograd.grad(stream.head()(states), begin, above)
    torch.testing.assert_close(stream.side_states.hidden(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_a_family_is_learned_at_mixed_widths_and_its_checkpoint_opens(name: str, family, tmp_path: Path) -> None:
    model = family(name)
    result = learn(model, tmp_path / "work", CANDIDATES, LEARNING)
    manifest = solve_scores(result.scores, SolveSettings(average_bits=3.75))
    assert {2, 4} <= {module.num_bits for module in manifest.modules.values()}
    report = export(manifest, model, result.bank_folder, tmp_path / "gamma")
    assert report.written == report.predicted
    logits = load_dequantized(tmp_path / "gamma")(torch.arange(20)[None]).logits
    assert logits.isfinite().all()


def test_experts_stored_as_one_tensor_are_the_same_modules(family, tmp_path: Path) -> None:
    single = read_inventory(family("olmoe"))
    tensors = load_file(single.folder / "model.safetensors")
    for block in range(2):
        parent = f"model.layers.{block}.mlp.experts"
        of = {leaf: [tensors.pop(f"{parent}.{e}.{leaf}.weight") for e in range(4)] for leaf in STACKED}
        halves = zip(of["gate_proj"], of["up_proj"], strict=True)
        tensors[f"{parent}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        tensors[f"{parent}.down_proj"] = torch.stack(of["down_proj"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(single.folder / "config.json", tmp_path)
    stacked = read_inventory(tmp_path)
    assert [m.name for m in stacked.modules] == [m.name for m in single.modules]
    for one, other in zip(single.modules, stacked.modules, strict=True):
        assert torch.equal(read_tensor(one.tensor), read_tensor(other.tensor)), one.name
    assert model_digest(stacked) == model_digest(single)


@pytest.mark.parametrize(
    ("name", "fused", "down", "transposed"),
    [
        ("granitemoe", "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight", False),
        ("gpt_oss", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", True),
    ],
)
def test_matrices_of_stacked_experts_are_read_one_by_one(name: str, fused: str, down: str, transposed: bool, family):
    inventory = read_inventory(family(name))
    tensors = load_file(inventory.folder / "model.safetensors")
    for block in range(2):
        whole, last = (tensors[f"model.layers.{block}.{stack}"] for stack in (fused, down))
        for module in (m for m in inventory.modules if m.block == block and ".experts." in m.name):
            expert, leaf = int(module.name.split(".")[-2]), module.name.rpartition(".")[2]
            matrix = (last if leaf == "down_proj" else whole)[expert]
            matrix = matrix.T if transposed else matrix
            if leaf in ("gate_proj", "up_proj"):
                matrix = matrix.chunk(2)[leaf == "up_proj"]
            assert module.shape == matrix.shape
            assert torch.equal(read_tensor(module.tensor), matrix), module.name
            assert torch.equal(read_rows(module.tensor, slice(3, 40)), matrix[3:40]), module.name


@pytest.mark.parametrize("name", chosen(WRAPPERS))
def test_a_language_model_beside_a_vision_tower_is_learned_and_the_tower_is_copied(name: str, tmp_path: Path) -> None:
    inventory = read_inventory(make_wrapper(name, tmp_path / "model"))
    assert not inventory.unknown
    stream = BlockStream(inventory)
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    (tmp_path / "states").mkdir()
    hidden = HiddenStates(tmp_path / "states", 2, 40, 128)
    stream.fill(hidden, tokens)
    whole = open_model(inventory.folder)
    with torch.inference_mode():
        expected = whole(input_ids=tokens).logits
        torch.testing.assert_close(stream.head()(hidden.boundary(stream.blocks)), expected, rtol=1e-5, atol=1e-5)
    result = learn(inventory.folder, tmp_path / "work", CANDIDATES, LEARNING)
    manifest = solve_scores(result.scores, SolveSettings(average_bits=3.75))
    export(manifest, inventory.folder, result.bank_folder, tmp_path / "gamma")
    again = load_dequantized(tmp_path / "gamma").state_dict()
    beside = [name for name in whole.state_dict() if "visi" in name or "visual" in name]
    assert beside
    assert all(torch.equal(whole.state_dict()[name], again[name]) for name in beside)


def test_an_lm_head_with_a_bias_is_refused_for_learning(family) -> None:
    from allocator.contract.errors import InputError

    with pytest.raises(InputError, match=r"PhiForCausalLM can be planned .* only: its lm_head has a bias"):
        read_inventory(family("phi"))


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_bias_of_the_lm_head_is_no_reason_where_config_json_says_there_is_none(use_bias: bool) -> None:
    config = AutoConfig.for_model("ernie4_5_moe", use_bias=use_bias).to_dict()
    reason = read_shape(config | {"architectures": ["Ernie4_5_MoeForCausalLM"]}).plan_only
    assert (reason is not None) == use_bias
