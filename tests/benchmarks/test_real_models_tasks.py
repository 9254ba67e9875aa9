"""LAMBADA and BLiMP: what is not there is said before the work. (lm-eval itself is no part of this environment.)"""

from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from benchmarks.real_models.tasks import Tasks


def test_documents_that_are_not_there_are_named_before_the_work(tmp_path: Path) -> None:
    for name in ("lambada/lambada_test.jsonl", "blimp/BLiMP.zip"):
        with pytest.raises(InputError, match=rf"{name}: no such file; --tasks names the folder .* or --documents 0"):
            Tasks(tmp_path, 4).check()
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    Tasks(tmp_path, 4).check()
