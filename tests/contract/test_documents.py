"""Bank, scores and manifest: what was written is read again, and every kind of damage is refused and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocator.contract.bank import Bank
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.digest import digest_json, digest_model
from allocator.contract.documents import Document, parse_json
from allocator.contract.errors import ContractError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores

QUERY = "model.layers.0.self_attn.q_proj"
KINDS: dict[str, type[Document]] = {"bank": Bank, "scores": Scores, "manifest": Manifest}

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(params=sorted(KINDS))
def document(request: pytest.FixtureRequest) -> Document:
    return request.getfixturevalue(request.param)


def read_changed(document: Document, folder: Path, change: Change, sign: bool = False) -> Document:
    """Write, change the JSON, with `sign` make its digest right again, and read."""
    path = folder / "document.json"
    document.write(path)
    content = json.loads(path.read_text())
    change(content)
    if sign:
        content["digest"] = digest_json({k: v for k, v in content.items() if k != "digest"})
    path.write_text(json.dumps(content))
    return type(document).read(path)


def test_written_document_is_read_again_with_the_same_digest(document, tmp_path):
    document.write(tmp_path / "x.json")
    again = type(document).read(tmp_path / "x.json")
    assert again == document
    assert again.digest == document.digest
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_formatting_does_not_count(document, tmp_path):
    assert read_changed(document, tmp_path, lambda d: d) == document


ENVELOPE: dict[str, tuple[Change, str]] = {
    "unknown schema version": (
        lambda d: d.update(schema_version=2),
        "schema_version is 2, this release reads 1",
    ),
    "schema version true": (lambda d: d.update(schema_version=True), "schema_version is True"),
    "no schema version": (lambda d: d.pop("schema_version"), "schema_version is None"),
    "other schema": (lambda d: d.update(schema="gamma.other"), "schema is 'gamma.other', expected 'gamma."),
    "no schema": (lambda d: d.pop("schema"), "schema is None"),
    "no digest": (lambda d: d.pop("digest"), "the file says None"),
    "wrong digest": (lambda d: d.update(digest="sha256:" + "0" * 64), "content digest is sha256:[0-9a-f]{64}"),
    "unknown key": (lambda d: d.update(colour="red"), "colour: Extra inputs are not permitted"),
    "unknown key inside": (lambda d: d["model"].update(colour="red"), "model.colour: Extra inputs"),
    "missing key": (lambda d: d.pop("model"), "model: Field required"),
    "other model": (lambda d: d["model"].update(digest="sha256:" + "f" * 64), "content digest is"),
    "digest that is none": (lambda d: d["model"].update(digest="abc"), "model.digest: .*given 'abc'"),
    "dtype that does not exist": (lambda d: d.update(dtype="F64"), "dtype: .*given 'F64'"),
    "text for a table": (lambda d: d.update(modules="none"), "modules: .*given 'none'"),
}


@pytest.mark.parametrize("damage", ENVELOPE)
def test_damaged_envelope_is_refused(document, tmp_path, damage):
    change, message = ENVELOPE[damage]
    with pytest.raises(ContractError, match=message) as refusal:
        read_changed(document, tmp_path, change)
    assert "document.json" in str(refusal.value)


def test_a_document_of_another_kind_is_refused(document, tmp_path):
    document.write(tmp_path / "x.json")
    for other in KINDS.values():
        if other is not type(document):
            with pytest.raises(ContractError, match=f"expected '{other.SCHEMA}'; this is another kind of file"):
                other.read(tmp_path / "x.json")


def module(d: dict[str, Any]) -> Any:
    return d["modules"][QUERY]


CONTENT: dict[str, list[tuple[str, Change, str]]] = {
    "bank": [
        ("width 7", lambda d: module(d)["candidates"][0].update(num_bits=7), f"{QUERY}.*num_bits.*given 7"),
        ("a width twice", lambda d: module(d)["candidates"][0].update(num_bits=4), f"{QUERY}: .*different widths"),
        (
            "two shapes",
            lambda d: module(d)["candidates"][0].update(shape=[16, 128]),
            f"{QUERY}: candidates must have one shape",
        ),
        (
            "K against group",
            lambda d: module(d)["candidates"][0].update(shape=[16, 48]),
            f"{QUERY}.*in_features 48",
        ),
        ("no candidates", lambda d: module(d).update(candidates=[]), f"{QUERY}.candidates: .*at least 1"),
        ("zero rows", lambda d: module(d)["candidates"][0].update(shape=[0, 64]), f"{QUERY}.*given 0"),
        ("no group", lambda d: module(d)["candidates"][0].pop("group_size"), "2-bit module needs group_size"),
    ],
    "scores": [
        (
            "changed width",
            lambda d: module(d)["candidates"][0]["format"].update(num_bits=3),
            f"{QUERY}.*336 bytes at 3 bits, its format has 464",
        ),
        (
            "changed bytes",
            lambda d: module(d)["candidates"][0].update(nbytes=1),
            f"{QUERY}.*1 bytes at 2 bits, its format has 336",
        ),
        (
            "changed shape",
            lambda d: module(d)["candidates"][0]["format"].update(shape=[32, 64]),
            f"{QUERY}.*its format has",
        ),
        ("score as text", lambda d: module(d)["candidates"][0].update(score="0.1"), f"{QUERY}.*score.*given '0.1'"),
        ("no candidates", lambda d: module(d).update(candidates=[]), f"{QUERY}.candidates"),
        ("negative bytes", lambda d: d.update(other_bytes=-1), "other_bytes: .*given -1"),
        ("bytes with a fraction", lambda d: d.update(other_bytes=1.5), "other_bytes: .*given 1.5"),
    ],
    "manifest": [
        ("changed width", lambda d: module(d).update(num_bits=3), f"{QUERY}: .* 3 bits at shape .* are 464"),
        ("changed shape", lambda d: module(d).update(shape=[16, 128]), rf"{QUERY}: .* shape \[16, 128\] are"),
        ("changed bytes", lambda d: d["module_bytes"].update({QUERY: 5}), f"{QUERY}: 5 bytes recorded, 4 bits"),
        ("changed sum", lambda d: d.update(tensor_bytes=9), "tensor_bytes is 9, the parts add up to"),
        ("module removed", lambda d: d["modules"].pop(QUERY), f"{QUERY}: stands in only one of modules"),
        (
            "budget below",
            lambda d: d["budget"].update(nbytes=100),
            "the assignment has [0-9]+ bytes, over the budget of 100",
        ),
        ("negative gap", lambda d: d["proof"].update(gap=-1.0), "proof.gap: .*given -1.0"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "damage", "change", "message"),
    [pytest.param(kind, *case, id=f"{kind}-{case[0]}") for kind, cases in CONTENT.items() for case in cases],
)
def test_contradiction_is_refused_even_with_a_right_digest(request, tmp_path, kind, damage, change, message):
    with pytest.raises(ContractError, match=message):
        read_changed(request.getfixturevalue(kind), tmp_path, change, sign=True)


def test_truncated_file_is_refused_wherever_it_is_cut(document, tmp_path):
    path = tmp_path / "x.json"
    document.write(path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ContractError, match=r"x\.json: not valid JSON .* cut short"):
            type(document).read(path)


RAW = {
    "duplicate key": (lambda text: text.replace('"model":', '"dtype": "BF16", "model":', 1), "'dtype' stands twice"),
    "NaN": (lambda text: text.replace('"BF16"', "NaN"), "NaN is not allowed"),
    "Infinity": (lambda text: text.replace('"BF16"', "-Infinity"), "Infinity is not allowed"),
    "a number that overflows": (lambda text: text.replace('"BF16"', "1e999"), "not valid JSON"),
    "a list": (lambda text: f"[{text}]", "expected a JSON object"),
    "nothing": (lambda text: "", "not valid JSON"),
    "endless nesting": (lambda text: "[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("damage", RAW)
def test_damaged_text_is_refused(document, tmp_path, damage):
    change, message = RAW[damage]
    path = tmp_path / "x.json"
    document.write(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ContractError, match=message):
        type(document).read(path)


def test_absent_and_binary_and_oversized_files_are_refused(document, tmp_path):
    kind, path = type(document), tmp_path / "x.json"
    with pytest.raises(ContractError, match="no such file"):
        kind.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ContractError, match="cannot be read"):
        kind.read(path)
    with path.open("wb") as file:
        file.truncate(kind.MAX_BYTES + 1)
    with pytest.raises(ContractError, match=f"{kind.MAX_BYTES + 1} bytes, allowed are {kind.MAX_BYTES}"):
        kind.read(path)


def test_a_refusal_does_not_repeat_megabytes_of_input(document, tmp_path):
    with pytest.raises(ContractError) as refusal:
        read_changed(document, tmp_path, lambda d: d.update(dtype="x" * 1_000_000))
    assert len(str(refusal.value)) < 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
envelopes = st.fixed_dictionaries(
    {"schema": st.sampled_from([k.SCHEMA for k in KINDS.values()]), "schema_version": st.just(1)},
    optional={
        key: json_values
        for key in ("model", "modules", "settings", "budget", "dtype", "digest", "other_bytes", "proof", "bank_digest")
    },
)


@settings(deadline=None, max_examples=150)
@given(json_values | envelopes)
def test_random_documents_raise_contract_errors_and_nothing_else(value):
    for kind in KINDS.values():
        with pytest.raises(ContractError):
            kind.parse(value, "fuzz")
    if isinstance(value, dict):
        with pytest.raises(ContractError):
            CheckpointConfig.parse(value, "fuzz")


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_random_bytes_raise_contract_errors_and_nothing_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "x.json"
    path.write_bytes(content)
    for kind in KINDS.values():
        with pytest.raises(ContractError):
            kind.read(path)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_single_changed_value_of_a_valid_document_is_refused(manifest, data):
    """Walk to a random place of a valid document and put something else there."""
    content = json.loads(json.dumps(manifest.payload() | {"digest": manifest.digest}))
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    value = data.draw(json_values.filter(lambda v: v != place[key] and v is not None))
    place[key] = value
    with pytest.raises(ContractError):
        Manifest.parse(content, "changed")


def test_published_schema_names_every_key_of_the_file(document):
    schema = type(document).published_schema()
    written = document.payload() | {"digest": document.digest}
    assert set(written) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) <= set(written)


def test_parse_json_names_the_place():
    with pytest.raises(ContractError, match="somewhere: not valid JSON"):
        parse_json("{", "somewhere")


def test_model_digest_ignores_the_order_and_sees_every_part():
    tensors = [("a", "F32", (2,), "sha256:1"), ("b", "F32", (3,), "sha256:2")]
    digest = digest_model(tensors, {"hidden_size": 4})
    assert digest == digest_model(reversed(tensors), {"hidden_size": 4})
    others = [
        digest_model([("a", "F32", (2,), "sha256:9"), tensors[1]], {"hidden_size": 4}),
        digest_model([("a", "F16", (2,), "sha256:1"), tensors[1]], {"hidden_size": 4}),
        digest_model([("a", "F32", (2, 1), "sha256:1"), tensors[1]], {"hidden_size": 4}),
        digest_model(tensors[:1], {"hidden_size": 4}),
        digest_model(tensors, {"hidden_size": 5}),
    ]
    assert len({digest, *others}) == 6
