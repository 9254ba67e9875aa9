"""Names on the hub: which id and revision they mean, and which are refused."""

import pytest

from allocator.contract.errors import InputError
from allocator.model.hf_config import split_hub


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (("org/name", None), ("org/name", None)),
        (("./folder", "v1"), ("./folder", "v1")),
        (("hf://org/name", None), ("org/name", None)),
        (("hf://org/name", "v1"), ("org/name", "v1")),
        (("hf://org/name@v1", None), ("org/name", "v1")),
        (("hf://org/name@refs/pr/1", None), ("org/name", "refs/pr/1")),
        (("hf://org/name@v1", "v1"), ("org/name", "v1")),
    ],
)
def test_scheme_and_revision(given, meant):
    assert split_hub(*given) == meant


@pytest.mark.parametrize("model", ["hf://name", "hf://org/name/file", "hf://org/name@", "hf://../x", "hf://org/a b"])
def test_other_forms_are_refused(model):
    with pytest.raises(InputError, match="expected hf://org/name"):
        split_hub(model)


def test_two_revisions_are_refused():
    with pytest.raises(InputError, match="give one of them"):
        split_hub("hf://org/name@v1", "v2")
