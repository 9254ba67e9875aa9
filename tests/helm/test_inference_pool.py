"""Allocations for a Gateway with the inference extension: pools of the pods that answer, and routes to them."""

import re

import pytest
import yaml

from tests.helm.charts import CHART, EXAMPLES, allocation, by_kind, pod_templates, render

LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_pool_has_the_pods_that_answer_and_no_others(helm4, nodes):
    values = allocation(nodes=nodes) | {"inferencePool": {"enabled": True}, "vllm": {"port": 9000}}
    values["allocations"] += allocation(name="two")["allocations"]
    objects = render(helm4, values)
    pool, _ = by_kind(objects, "InferencePool")
    assert pool["metadata"]["name"] == "demo-gamma-one"
    labels = pool["spec"]["selector"]["matchLabels"]
    # The controller of a LeaderWorkerSet gives each pod its index.
    templates = [
        t for item in objects if item["kind"] in ("Deployment", "LeaderWorkerSet") for t in pod_templates(item)
    ]
    fitting = [
        t for t in templates if labels.items() <= (t["metadata"]["labels"] | (LEADER if nodes > 1 else {})).items()
    ]
    assert {t["metadata"]["labels"]["gamma/allocation"] for t in fitting} == {"one"}
    assert (labels.items() >= LEADER.items()) == (nodes > 1)
    (service, _) = by_kind(objects, "Service", "serving")
    assert service["spec"]["selector"] == labels
    ports = [p["containerPort"] for p in fitting[0]["spec"]["containers"][0]["ports"]]
    assert [p["number"] for p in pool["spec"]["targetPorts"]] == ports == [9000]


def test_only_what_has_a_pool_is_routed_to_one(helm4):
    objects = render(helm4, EXAMPLES["inference-pool"])
    (pool,) = by_kind(objects, "InferencePool")
    backends = {r["metadata"]["name"]: r["spec"]["rules"][0]["backendRefs"] for r in by_kind(objects, "HTTPRoute")}
    assert backends["demo-gamma-qwen3-32b"] == [
        {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool["metadata"]["name"]}
    ]
    assert backends["demo-gamma-small"] == [{"name": "demo-gamma-small", "port": 8000}]


@pytest.mark.parametrize(
    ("name", "service"),
    [("one", "demo-gamma-one-epp"), ("a" * 32, f"demo-gamma-{'a' * 29}-epp")],
    ids=["short", "long"],
)
def test_the_picker_is_where_the_chart_of_llm_d_puts_it(helm4, name, service):
    """In a release of the pool's name: its first 40 characters and -epp, port 9002."""
    (pool,) = by_kind(render(helm4, allocation(name=name) | {"inferencePool": {"enabled": True}}), "InferencePool")
    assert pool["spec"]["endpointPickerRef"] == {"name": service, "port": {"number": 9002}, "failureMode": "FailOpen"}


def test_the_picker_of_the_docs_asks_the_pods_of_the_pool(helm4):
    text = (CHART.parents[1] / "docs" / "operations.md").read_text()
    told = yaml.safe_load(re.findall(r"^ +matchLabels: (.*)$", text, re.MULTILINE)[0])
    (pool,) = by_kind(render(helm4, EXAMPLES["inference-pool"]), "InferencePool")
    labels = pool["spec"]["selector"]["matchLabels"]
    assert told | {"app.kubernetes.io/instance": "demo", "app.kubernetes.io/name": "gamma"} == labels


def test_another_picker_can_be_named(helm4):
    one = allocation(inferencePool={"enabled": True, "endpointPicker": {"service": "mine"}, "failureMode": "FailClose"})
    (pool,) = by_kind(render(helm4, one), "InferencePool")
    assert pool["spec"]["endpointPickerRef"] == {"name": "mine", "port": {"number": 9002}, "failureMode": "FailClose"}
