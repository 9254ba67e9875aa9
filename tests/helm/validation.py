"""Checks objects against the schemas of Kubernetes and of the custom resources that the chart makes."""

import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate.utils

from tests.helm.charts import Object, pod_templates

__all__ = ["check_object"]

# The schemas of one version are megabytes, read anew for each object otherwise.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)
_CRDS = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "InferencePool", "LeaderWorkerSet"}


@cache
def _crd(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "crds" / f"{kind.lower()}.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def check_object(item: Object, kubernetes: str) -> None:
    """Raises what is wrong with the object. `kubernetes` is a version such as 1.34."""
    if item["kind"] in _CRDS:
        _crd(item["kind"]).validate(item)
        for template in pod_templates(item):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"] | {"name": "a"}}
            kubernetes_validate.validate(pod | {"spec": template["spec"]}, kubernetes, strict=True)
    else:
        kubernetes_validate.validate(item, kubernetes, strict=True)
