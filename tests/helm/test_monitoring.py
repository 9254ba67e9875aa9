"""Alerts fire when they should, and rules, dashboard and autoscalers name metrics that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm.charts import CHART, allocation, by_kind, render
from tests.programs import program

HERE = Path(__file__).parent
OPERATIONS = CHART.parents[1] / "docs" / "operations.md"
ENABLED = {"monitoring": {part: {"enabled": True} for part in ("serviceMonitor", "rules", "dashboard")}}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?=\{)")


@pytest.fixture
def objects(helm4):
    return render(helm4, allocation() | ENABLED)


@pytest.fixture
def rules(objects):
    (item,) = by_kind(objects, "PrometheusRule")
    return item["spec"]


@pytest.fixture
def dashboard(objects):
    (item,) = by_kind(objects, "ConfigMap", "monitoring")
    return json.loads(item["data"]["gamma.json"])


def queries(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def metrics_in(expressions) -> set[str]:
    return {name for expression in expressions for name in _NAME.findall(expression)}


def promtool(folder, *arguments):
    done = subprocess.run([program("promtool"), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts(rules, tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(HERE / "alerts" / "tests.yaml", tmp_path)
    promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "test", "rules", "tests.yaml")


def names(rules):
    return [rule["alert"] for group in rules["groups"] for rule in group["rules"]]


def test_every_alert_is_tested_and_explained(rules):
    tests = yaml.safe_load((HERE / "alerts" / "tests.yaml").read_text())
    tested = {case["alertname"] for test in tests["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert tested == set(names(rules))
    headings = re.findall(r"^#+ (\S+)$", OPERATIONS.read_text(), re.MULTILINE)
    assert set(names(rules)) <= set(headings)


def test_thresholds_and_runbooks_come_from_the_values(helm4):
    values = {
        "firstTokenSeconds": 2.5,
        "waitingRequests": 99,
        "headroomBytes": 12345678901,
        "runbookUrl": "https://x/#",
    }
    changed = render(helm4, allocation() | {"monitoring": {"rules": {"enabled": True} | values}})
    text = yaml.safe_dump(by_kind(changed, "PrometheusRule")[0]["spec"], width=10_000)
    assert "> 2.5\n" in text
    assert "> 99\n" in text
    assert "< 12345678901\n" in text
    assert "https://x/#gammakvcachefull" in text
    assert "$NAMESPACE" not in text
    assert "$SERVICES" not in text


def test_an_allocation_of_no_pods_is_not_missed(helm4):
    """Scaled to zero on purpose, by number or by a queue."""
    keda = {"type": "keda", "minReplicas": 0, "keda": {"serverAddress": "http://p:9090", "query": "q"}}
    one = allocation()["allocations"][0]
    values = allocation() | ENABLED
    values["allocations"] = [one, one | {"name": "none", "replicas": 0}, one | {"name": "idle", "autoscaling": keda}]
    (rules,) = by_kind(render(helm4, values), "PrometheusRule")
    missed = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"] if "absent" in rule["expr"]]
    assert missed == ['absent(up{namespace="llm",service="demo-gamma-one",endpoint="http"})']


def test_dashboard_queries_parse(dashboard, tmp_path):
    rules = [
        {"record": f"panel{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries(dashboard))
    ]
    assert len(rules) > 10
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool(tmp_path, "check", "rules", "rules.yaml")


def test_panels_do_not_overlap(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_metrics_of_vllm_exist_in_its_source(rules, dashboard, helm4):
    """tests/e2e asks a live server; here the source, which is quick."""
    vllm = pytest.importorskip("vllm")
    source = "".join(path.read_text() for path in (Path(vllm.__file__).parent / "v1" / "metrics").glob("*.py"))
    keda = {"type": "keda", "keda": {"serverAddress": "http://p:9090"}}
    (scaled,) = by_kind(render(helm4, allocation(autoscaling=keda)), "ScaledObject")
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    expressions += [*queries(dashboard), scaled["spec"]["triggers"][0]["metadata"]["query"]]
    used = {name for name in metrics_in(expressions) if name.startswith("vllm:")}
    assert len(used) >= 6
    for name in used:
        assert f'"{re.sub("_(total|bucket|count|sum)$", "", name)}"' in source, name


def test_metrics_of_the_sidecar_exist(rules, dashboard):
    metrics = pytest.importorskip("allocator.sidecar.metrics")
    registry = metrics.Metrics().registry
    sidecar = {name for family in registry.collect() for name in exported(family)}
    announced = {"gamma_manifest_info", "gamma_weight_bytes", "gamma_modules"}  # by the plugin, in vLLM's /metrics
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]] + queries(dashboard)
    used = {name for name in metrics_in(expressions) if name.startswith("gamma_")}
    assert used - announced <= sidecar
    plugin = (CHART.parents[1] / "gamma_vllm" / "announce.py").read_text()
    assert all(f'"{name}"' in plugin for name in used & announced)


def exported(family) -> list[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
    return [family.name + suffix for suffix in suffixes]
