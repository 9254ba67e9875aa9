"""Sequences begin as the model was trained, chats are its own template's, and wrong tokenizers are refused by name."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model, calibration_from_text
from allocator.blocks.hf_model import open_config
from allocator.contract.errors import InputError
from allocator.model import read_inventory

BOS = 257
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}\n"


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def add_bos(model: Path) -> None:
    """Let the tokenizer put a BOS of its own before every text, as those of Gemma and Llama do."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    token = {"id": BOS, "content": "<bos>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(token | {"normalized": False})
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    change(model / "tokenizer_config.json", bos_token="<bos>")


def test_every_sequence_begins_with_bos_where_the_tokenizer_adds_it(model: Path, tmp_path: Path) -> None:
    add_bos(model)
    long, short = tmp_path / "long.txt", tmp_path / "short.json"
    long.write_text("A text without an end, " * 100)
    short.write_text(json.dumps(["Many short texts."] * 100))
    ids = calibration_from_text(model, [long], 16, 32, 0).token_ids
    assert (ids[:, 0] == BOS).all()
    assert int((ids == BOS).sum()) == 16  # it stands nowhere else, the text having begun once
    ids = calibration_from_text(model, [short], 16, 32, 0).token_ids
    assert (ids[:, 0] == BOS).all()
    assert (ids[:, 1:] == BOS).any()  # where the next text of a sequence begins
    assert not ((ids[:, 1:] == BOS) & (ids[:, :-1] == BOS)).any()
    assert (calibration_from_model(model, 4, 8, 0).token_ids[:, 0] == BOS).all()
    with pytest.raises(InputError, match="too short"):
        calibration_from_text(model, [long], 1, 1, 0)


def test_chats_get_one_bos_and_one_end(model: Path, tmp_path: Path) -> None:
    add_bos(model)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "Hello there"}]}\n' * 30)
    with pytest.raises(InputError, match=r"chats.jsonl: line 1: .*no chat template"):
        calibration_from_text(model, [chats], 1, 8, 0)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    ids = calibration_from_text(model, [chats], 1, 128, 0).token_ids[0].tolist()
    count = Counter(ids)
    assert 4 <= count[BOS] <= count[0] + 1
    assert all(before == 0 for at, before in enumerate(ids[:-1]) if ids[at + 1] == BOS)
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"chats.jsonl: line 1: .*roles must alternate"):
        calibration_from_text(model, [chats], 1, 8, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.9, "do_sample": True, "top_k": 2, "top_p": 0.2, "temperature": 0.1},
        {"num_beams": 4, "min_p": 0.9, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(150))},
        {"stop_strings": ["a"], "max_length": 4, "use_cache": False, "prompt_lookup_num_tokens": 3},
    ],
)
def test_generation_config_does_not_bend_what_the_model_writes(model: Path, settings: dict[str, Any]) -> None:
    plain = calibration_from_model(model, 4, 16, seed=3)
    change(model / "generation_config.json", **settings)
    assert calibration_from_model(model, 4, 16, seed=3).digest == plain.digest


def test_what_a_model_writes_is_its_own_distribution(model: Path) -> None:
    """Second tokens come as often as the model's probabilities after the first say, but for the end of the text."""
    from transformers import AutoModelForCausalLM

    ids = calibration_from_model(model, 4000, 2, seed=0).token_ids
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids[:1, :1]).logits[0, -1].clone()
        logits[0] = -torch.inf
    expected = logits.softmax(-1) * len(ids)
    found = torch.bincount(ids[:, 1], minlength=len(expected)).float()
    often = expected > 5
    assert often.sum() > 20
    assert float(((found - expected)[often].square() / expected[often]).mean()) < 1.5


def test_tokens_without_a_row_are_named(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|extra{i}|>" for i in range(80)])
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("some <|extra79|> text " * 100)
    with pytest.raises(InputError, match=r"<\|extra79\|>.* number 336, and the embedding 320 rows"):
        calibration_from_text(model, [text], 1, 8, 0)


def test_a_folder_without_a_tokenizer_or_with_code_of_its_own_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 100)
    (model / "tokenizer.json").rename(model / "away")
    (model / "tokenization_x.py").write_text("raise SystemExit('code of a model folder was run')")
    code = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    change(model / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=code)
    change(model / "config.json", model_type="llama")
    with pytest.raises(InputError, match="tokenizer") as error:
        calibration_from_text(model, [text], 1, 8, 0)
    assert str(model) in str(error.value)
    assert "trust_remote_code" not in str(error.value)
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        calibration_from_text(model, [text], 1, 8, 0)


@pytest.mark.parametrize(("pad", "refused"), [(32000, True), (-1, False), (7, False)])
def test_a_pad_token_outside_the_vocabulary_is_named(pad: int, refused: bool, model: Path) -> None:
    change(model / "config.json", pad_token_id=pad)
    if refused:
        with pytest.raises(InputError, match="pad_token_id 32000 is outside the vocabulary of 320"):
            open_config(model)
    else:
        BlockStream(read_inventory(model))
