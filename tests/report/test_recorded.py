"""What manifests say was measured: of which assignment, on which text, and only beside their own scores."""

import pytest

from allocator.contract.errors import ContractError
from allocator.contract.manifest import Manifest, Refinement, Verification
from allocator.report.recorded import recorded_loss

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
TEXT, OTHER_TEXT = "sha256:" + "a" * 64, "sha256:" + "b" * 64
VERIFIED = Verification(text_digest=TEXT, tokens=64, kl=0.2, uniform_kl=0.3, uniform_bits=4, kept="assignment")
REFINED = Refinement(text_digest=OTHER_TEXT, tokens=128, kl_before=0.2, kl=0.1, tried=5, kept=1)


@pytest.fixture
def solved(make_manifest, make_scores) -> Manifest:
    return make_manifest({NAMES[0]: 4, NAMES[1]: 8}, scores_digest=make_scores(NAMES).digest)


def test_what_is_measured_is_of_the_assignment_that_the_manifest_holds(solved, make_scores):
    scores = make_scores(NAMES)

    def loss(**changes):
        return recorded_loss(solved.model_copy(update=changes), scores)

    assert loss() is None
    verified = loss(verification=VERIFIED)
    assert (verified.record, verified.measured_loss, verified.tokens) == ("verification", 0.2, 64)
    assert (verified.uniform_loss, verified.uniform_bits) == (0.3, 4)
    assert verified.predicted_loss == pytest.approx(4.0**-4 + 2 * 4.0**-8)
    fell_back = VERIFIED.model_copy(update={"uniform_kl": 0.15, "kept": "uniform"})
    assert loss(verification=fell_back, method="uniform").measured_loss == 0.15
    refined = loss(verification=VERIFIED, refinement=REFINED)  # changed after it was verified
    assert (refined.record, refined.measured_loss, refined.text_digest) == ("refinement", 0.1, OTHER_TEXT)
    assert refined.uniform_loss is None
    unchanged = REFINED.model_copy(update={"kept": 0, "kl": 0.2})
    assert loss(verification=VERIFIED, refinement=unchanged).record == "verification"
    assert loss(refinement=unchanged).record == "refinement"


def test_a_manifest_of_other_scores_is_refused(solved, make_scores):
    other = make_scores(NAMES, widths=(4, 8, 16))
    with pytest.raises(ContractError, match=f"was solved from scores {solved.scores_digest}, given are"):
        recorded_loss(solved, other)
