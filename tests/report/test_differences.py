"""`gamma diff` and `gamma show`: what changed, in widths, bytes and loss, and nothing of another model."""

import csv
import io
import json
import subprocess
import sys

import pytest

from allocator.contract.errors import ContractError
from allocator.contract.layout import module_bytes
from allocator.report.differences import compare

LINEARS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
NAMES = [f"model.layers.{i}.{linear}" for i in range(3) for linear in LINEARS] + ["lm_head"]
BEFORE = dict.fromkeys(NAMES, 4)
AFTER = BEFORE | {"model.layers.1.mlp.up_proj": 2, "model.layers.2.self_attn.q_proj": 8, "lm_head": 16}
OTHER_MODEL = "sha256:" + "f" * 64


def gamma(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def files(make_manifest, make_scores, tmp_path):
    make_manifest(BEFORE, objective=2.0).write(tmp_path / "a.json")
    make_manifest(AFTER, objective=1.5).write(tmp_path / "b.json")
    make_scores(NAMES).write(tmp_path / "scores.json")
    return tmp_path


def test_changes_add_up_in_bytes_and_in_loss(make_manifest, make_scores):
    before, after = make_manifest(BEFORE), make_manifest(AFTER)
    comparison = compare(before, after, make_scores(NAMES))
    assert [c.module for c in comparison.changes] == [n for n in NAMES if BEFORE[n] != AFTER[n]]
    assert sum(c.bytes_after - c.bytes_before for c in comparison.changes) == after.tensor_bytes - before.tensor_bytes
    for change in comparison.changes:
        assert change.bytes_after == module_bytes(after.modules[change.module])
    by_hand = sum((i + 1) * (4.0 ** -AFTER[n] - 4.0 ** -BEFORE[n]) for i, n in enumerate(NAMES))
    assert comparison.loss_change == pytest.approx(by_hand, rel=1e-12)
    assert sum(c.loss_after - c.loss_before for c in comparison.changes) == pytest.approx(by_hand, rel=1e-9)


def test_recorded_losses_compare_only_when_the_scores_were_the_same(make_manifest):
    before = make_manifest(BEFORE, objective=2.0)
    assert compare(before, make_manifest(AFTER, objective=1.5)).loss_change == -0.5
    assert compare(before, make_manifest(AFTER, scores_digest=OTHER_MODEL)).loss_change is None


def test_another_model_is_refused_with_both_digests(make_manifest, make_scores):
    before = make_manifest(BEFORE)
    for act in (
        lambda: compare(before, make_manifest(AFTER, model_digest=OTHER_MODEL)),
        lambda: compare(before, make_manifest(AFTER), make_scores(NAMES, model_digest=OTHER_MODEL)),
    ):
        with pytest.raises(ContractError) as refusal:
            act()
        assert OTHER_MODEL in str(refusal.value)
        assert before.model.digest in str(refusal.value)


def test_scores_without_the_candidate_are_refused(make_manifest, make_scores):
    with pytest.raises(ContractError, match=r"layers\.1\.mlp\.up_proj: .* 2 bits"):
        compare(make_manifest(BEFORE), make_manifest(AFTER), make_scores(NAMES, widths=(4, 8, 16)))


def test_table_csv_and_json_of_diff_say_the_same(files):
    table = gamma("diff", files / "a.json", files / "b.json", "--scores", files / "scores.json")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.strip()}
    assert rows["0"] == ["."] * 7
    assert rows["1"] == [*["."] * 5, "4>2", "."]
    assert rows["2"] == ["4>8", *["."] * 6]
    assert "lm_head 4>16" in table
    assert max(map(len, table.splitlines())) <= 80
    document = json.loads(
        gamma("diff", files / "a.json", files / "b.json", "--scores", files / "scores.json", "--json")
    )
    read = list(csv.DictReader(io.StringIO(gamma("diff", files / "a.json", files / "b.json", "--csv"))))
    assert [(r["module"], int(r["bytes_change"])) for r in read] == [
        (c["module"], c["bytes_change"]) for c in document["changed"]
    ]
    assert document["tensor_bytes_change"] == sum(int(r["bytes_change"]) for r in read)
    assert "no module differs" in gamma("diff", files / "a.json", files / "a.json")


def test_refusal_is_one_line_and_exit_code_3(files, make_manifest):
    make_manifest(AFTER, model_digest=OTHER_MODEL).write(files / "c.json")
    message = gamma("diff", files / "a.json", files / "c.json", code=3)
    assert "different models" in message
    assert "Traceback" not in message
    assert "must end in .png or .svg" in gamma("show", files / "a.json", "--figure", files / "x.pdf", code=2)


def test_show_prints_every_module_and_draws_png_and_svg(files):
    figures = [files / "widths.png", files / "widths.svg"]
    text = gamma("show", files / "b.json", *(f"--figure={path}" for path in figures))
    assert "lm_head 16" in text
    assert figures[0].read_bytes().startswith(b"\x89PNG")
    svg = figures[1].read_text()
    assert "some, " in svg
    assert ">up</text>" in svg
    again = files / "again.svg"
    gamma("show", files / "b.json", f"--figure={again}")
    assert again.read_text() == svg
    rows = list(csv.DictReader(io.StringIO(gamma("show", files / "b.json", "--csv"))))
    assert {r["module"]: int(r["bits"]) for r in rows} == AFTER


def test_figure_without_matplotlib_says_what_to_install(files):
    code = (
        "import sys; sys.modules.update(matplotlib=None)\n"
        "from allocator.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "show", str(files / "a.json")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command, "--figure", str(files / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gamma-vllm[report]" in done.stderr


def test_experts_of_a_layer_share_a_column(make_manifest, tmp_path):
    widths = {}
    for block in range(2):
        widths |= {f"model.layers.{block}.self_attn.{p}_proj": 4 for p in "qkvo"}
        for expert in range(4):
            name = f"model.layers.{block}.mlp.experts.{expert}"
            widths |= {f"{name}.gate_proj": 2 + expert % 2, f"{name}.up_proj": 3, f"{name}.down_proj": 8}
    make_manifest(widths).write(tmp_path / "moe.json")
    lines = gamma("show", tmp_path / "moe.json").splitlines()
    assert ["block", "q", "k", "v", "o", "x.gate", "x.up", "x.down"] in [line.split() for line in lines]
    assert ["0-1", "4", "4", "4", "4", "2.5", "3", "8"] in [line.split() for line in lines]
