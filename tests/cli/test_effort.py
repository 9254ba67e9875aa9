"""Levels of effort: which candidates are made, and whether those that are chosen are tuned."""

import argparse
from pathlib import Path

import pytest

from allocator.cli import fit
from allocator.pipeline import FitRequest, fitting
from allocator.pipeline.effort import EFFORTS


class AskedError(Exception):
    """Carries the request, in the place of the work."""


@pytest.mark.parametrize(
    ("options", "quantizer", "tuned"),
    [
        ([], EFFORTS["thorough"].quantizer, False),
        (["--effort", "thorough"], EFFORTS["thorough"].quantizer, False),
        (["--effort", "fast"], "gptq", False),
        (["--effort", "best"], EFFORTS["best"].quantizer, True),
        (["--effort", "best", "--no-tune"], EFFORTS["best"].quantizer, False),
        (["--effort", "fast", "--tune"], "gptq", True),
        (["--effort", "best", "--quantizer", "mse"], "mse", True),
    ],
)
def test_other_options_override_the_level(
    options: list[str], quantizer: str, tuned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked(request: FitRequest, _progress: object) -> None:
        raise AskedError(request)

    monkeypatch.setattr(fitting, "fit", asked)
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    with pytest.raises(AskedError) as found:
        fit.run(parser.parse_args(["model", "--average-bits", "3", "--out", str(tmp_path / "out"), *options]))
    request = found.value.args[0]
    assert (request.candidates.quantizer, request.tuned) == (quantizer, tuned)
