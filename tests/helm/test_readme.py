"""The chart's README says what the chart does."""

import importlib.util
import json

import pytest
import yaml

from tests.helm.charts import CHART

VALUES = (CHART / "values.yaml").read_text()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("chart_readme", CHART / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_current(generator):
    assert (CHART / "README.md").read_text() == generator.readme(), "run: python helm/gamma/readme.py"


def leaves(values, path=""):
    """Paths that end in something else than a section of the chart's own."""
    for key, value in values.items():
        at = f"{path}.{key}".removeprefix(".")
        free = at in FREE
        if isinstance(value, dict) and value and not free:
            yield from leaves(value, at)
        else:
            yield at


# Sections whose keys are Kubernetes' or the user's.
FREE = {"gpuProfiles", "podSecurityContext", "securityContext"} | {
    f"{part}.resources" for part in ("prepare", "vllm", "sidecar", "clusterSidecar", "learn", "router")
} | {"monitoring.dashboard.labels"}  # fmt: skip


def test_every_value_is_described(generator):
    assert set(leaves(yaml.safe_load(VALUES))) == set(generator.documented(VALUES))


def resolve(schema):
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_schema_and_values_name_the_same_keys():
    """Every section of the chart's own is closed, and knows exactly the keys that values.yaml has."""

    def compare(values, schema, path):
        schema = resolve(schema)
        if path in FREE or not isinstance(values, dict) or "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        assert set(values) == set(schema["properties"]) - ({"global"} if not path else set()), path
        for key, value in values.items():
            compare(value, schema["properties"][key], f"{path}.{key}".removeprefix("."))

    compare(yaml.safe_load(VALUES), SCHEMA, "")
