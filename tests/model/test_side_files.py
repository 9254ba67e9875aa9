"""Every file of a model folder is read, carried along, or left out by name."""

import json
import shutil

import pytest

from allocator.contract.errors import InputError
from allocator.model import carry, read_inventory, side_files

CARRIED = [
    "LICENSE",
    "SYSTEM_PROMPT.txt", "additional_chat_templates/tool_use.jinja", "chat_template.jinja",
    "custom_generate/generate.py", "merges.bpe", "params.json", "tekken.json", "tokenization_x.py",
    "tokenizer.model.v3",
]  # fmt: skip
LEFT_OUT = {
    ".gitattributes": "hidden", "README.md": "documentation", "bank.json": "written anew",
    "consolidated.safetensors": "weights",
    "consolidated.safetensors.index.json": "an index of weights",
    "original/": "a folder that nothing reads",
    "pytorch_model.bin": "weights", "vocab.txt": "a link that leads nowhere",
}  # fmt: skip


@pytest.fixture
def folder(make_model):
    made = make_model()
    shutil.copy(made / "model.safetensors", made / "consolidated.safetensors")
    for name in [*CARRIED, *LEFT_OUT]:
        path = made / name.rstrip("/")
        path.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name == "vocab.txt":
            path.symlink_to("nowhere")
        elif not path.exists():
            path.write_text(name)
    return made


def test_every_file_is_read_carried_or_left_out_with_a_reason(folder):
    files = side_files(read_inventory(folder))
    assert list(files.carried) == CARRIED
    assert files.left_out.keys() == LEFT_OUT.keys()
    for name, reason in LEFT_OUT.items():
        assert files.left_out[name].startswith(reason)
    assert any("README.md" in line for line in files.told())


def test_what_is_carried_lies_where_it_lay(folder, tmp_path):
    (tmp_path / "out").mkdir()
    carry(read_inventory(folder), tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == CARRIED
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in CARRIED)


def test_the_index_says_which_safetensors_files_are_the_models(folder):
    inventory = read_inventory(folder)
    names = [*(m.tensor.name for m in inventory.modules), *(t.name for t in inventory.others)]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_model.safetensors").write_text("not read")
    assert side_files(read_inventory(folder)).left_out["adapter_model.safetensors"].startswith("weights")


def test_weights_in_mistrals_own_format_alone_are_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only consolidated\.safetensors; convert the model"):
        read_inventory(folder)
