"""Models without an lm_head: what an error costs is read off their scores, or off the direction of their states."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from allocator.blocks.gradients import fill_gradients  # noqa: E402
from allocator.blocks.hidden_states import HiddenStates  # noqa: E402
from allocator.blocks.stream import BlockStream  # noqa: E402
from allocator.contract.errors import InputError  # noqa: E402
from allocator.evaluate import load_dequantized  # noqa: E402
from allocator.model import read_inventory  # noqa: E402
from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores  # noqa: E402
from allocator.score import LearningSettings  # noqa: E402

TOKENS = torch.arange(48).view(2, 24) * 5 % 320


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """Folder of a random model of that class, by the sizes of the tiny Qwen3."""
    import transformers

    def make(name, **changes):
        folder = tmp_path_factory.mktemp(name)
        config = transformers.AutoConfig.from_pretrained(tiny_model("qwen3"), **changes)
        torch.manual_seed(3)
        getattr(transformers, name)(config).to(torch.bfloat16).save_pretrained(folder)
        for path in tiny_model("qwen3").glob("tokenizer*"):
            shutil.copy(path, folder)
        return folder

    return make


def _filled(stream, folder):
    hidden = HiddenStates(folder, *TOKENS.shape, stream.inventory.shape.hidden_size)
    stream.fill(hidden, TOKENS)
    return hidden


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_is_judged_by_the_scores_that_transformers_gives(model, tmp_path, labels):
    from transformers import AutoModelForSequenceClassification

    folder = model("Qwen3ForSequenceClassification", num_labels=labels)
    stream = BlockStream(read_inventory(folder))
    found = stream.head()(_filled(stream, tmp_path).boundary(stream.blocks))[:, -1]
    whole = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.cat([whole(row[None]).logits for row in TOKENS])
    if labels == 1:  # yes against no
        expected = torch.cat([torch.zeros(2, 1), expected], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_an_embedding_model_say_how_far_an_error_turns_its_states(model, tmp_path):
    stream = BlockStream(read_inventory(model("Qwen3Model")))
    hidden = _filled(stream, tmp_path)
    gradients = [hidden.beside(str(probe)) for probe in range(256)]
    fill_gradients(stream, hidden, gradients, seed=1)
    states, norm = hidden.boundary(stream.blocks), stream.norm()
    error = 1e-2 * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    along = torch.stack([(g.boundary(stream.blocks) * error).sum(-1) for g in gradients])
    turned = 1 - torch.cosine_similarity(norm(states).double(), norm(states + error).double(), dim=-1)
    assert float(along.square().mean() / 2) == pytest.approx(float(turned.mean()), rel=0.1)


def test_the_manifest_says_the_bytes_of_layers_that_predict_further_tokens(model, tmp_path):
    folder = model("Qwen3ForCausalLM")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(4, 8).bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    candidates = CandidateSettings(quantizer="rtn", widths=(4, 16), group_size=32, sequences=2, sequence_length=16)
    result = learn(folder, tmp_path / "work", candidates, LearningSettings(draws=1))
    manifest = solve_scores(result.scores, SolveSettings(average_bits=5))
    assert manifest.predicting_bytes == 64
    export(manifest, folder, result.bank_folder, tmp_path / "gamma")
    assert load_file(tmp_path / "gamma" / "model.safetensors")["mtp.fc.weight"].shape == (4, 8)


def test_an_embedding_model_is_learned_and_exported_and_has_no_kl(model, tmp_path):
    folder = model("Qwen3Model")
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    candidates = CandidateSettings(quantizer="rtn", group_size=32, sequences=2, sequence_length=16)
    result = learn(folder, tmp_path / "work", candidates, LearningSettings(draws=2))
    assert result.scores.unit.startswith("1 - cosine")
    manifest = solve_scores(result.scores, SolveSettings(average_bits=5))
    export(manifest, folder, result.bank_folder, tmp_path / "gamma")
    assert type(load_dequantized(tmp_path / "gamma")).__name__ == "Qwen3Model"
    assert (tmp_path / "gamma" / "1_Pooling" / "config.json").exists()
    with pytest.raises(InputError, match="Qwen3Model predicts nothing, so it has no KL divergence"):
        BlockStream(read_inventory(folder)).head()
