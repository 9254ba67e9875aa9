"""The OpenAPI document is true: schemathesis finds no answer that it does not name, and no 5xx."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.skips import lacking

from .serving import Running

# Rules between fields (exactly one budget; smallest below largest) cannot all be told in a JSON Schema.
NOT_CHECKED = "positive_data_acceptance"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("schemathesis") is None, reason=lacking("package", "schemathesis is not here"))
def test_schemathesis_finds_nothing(sidecar: Running, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{sidecar.url}/openapi.json", "--exclude-checks", NOT_CHECKED,
        "--max-examples", "15", "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all",
        "--request-timeout", "60", "--seed", "1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Tested: 16" in done.stdout


def test_the_document_has_examples_and_every_error(sidecar: Running) -> None:
    document = sidecar.get("/openapi.json")
    assert len(document["paths"]) == 16
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {"200", "202"} & operation["responses"].keys()
            assert {"400", "405", "500"} <= operation["responses"].keys()
            assert path.startswith("/v1/") == ("security" in operation)
            body = operation.get("requestBody")
            assert body is None or body["content"]["application/json"]["examples"]
