"""install, upgrade, rollback, test and uninstall, by real helm against an API that checks what it is sent."""

import json

import pytest
import yaml

from tests.helm.charts import CHART, EXAMPLES, Helm, allocation, by_kind
from tests.helm.kubernetes_api import KubernetesApi


@pytest.fixture
def api():
    with KubernetesApi() as running:
        yield running


def cluster_of(helm, api, folder):
    """helm with a kubeconfig of its own."""
    config = folder / "kubeconfig"
    user = {"name": "nobody", "user": {"token": "none"}}
    context = {"name": "stub", "context": {"cluster": "stub", "user": "nobody", "namespace": "llm"}}
    clusters = [{"name": "stub", "cluster": {"server": api.url}}]
    document = {"apiVersion": "v1", "kind": "Config", "clusters": clusters, "users": [user], "contexts": [context]}
    config.write_text(yaml.safe_dump(document | {"current-context": "stub"}))
    return Helm(helm.name, ("--kubeconfig", str(config), "--namespace", "llm"))


@pytest.fixture
def cluster(helm, api, tmp_path):
    return cluster_of(helm, api, tmp_path)


def write(folder, values):
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait(cluster):
    """helm 3 waits for a ReplicaSet whose template is the API server's, with its defaults; this API has none."""
    return ["--wait", "--timeout", "30s"] if cluster.name == "helm4" else []


def test_install_upgrade_rollback_test_uninstall(cluster, api, tmp_path):
    values = write(tmp_path, allocation(budget="8GiB") | {"clusterSidecar": {"enabled": True}})
    done = cluster.run("install", "demo", CHART, "-f", values, *wait(cluster))
    assert "rollout status deploy/demo-gamma-one" in done.stdout
    first = json.loads(json.dumps(api.rollouts["demo-gamma-one"][-1]))
    former = cluster.run("get", "manifest", "demo").stdout

    upgraded = write(tmp_path, allocation(budget="6GiB") | {"clusterSidecar": {"enabled": True}})
    cluster.run("upgrade", "demo", CHART, "-f", upgraded, *wait(cluster))
    assert len(api.rollouts["demo-gamma-one"]) == 2  # the budget rolled the pods
    assert len(api.rollouts["demo-gamma-console"]) == 1  # and only those
    second = api.rollouts["demo-gamma-one"][-1]
    assert "--budget=6GiB" in second["spec"]["initContainers"][0]["args"]
    assert second["metadata"]["annotations"]["gamma/request"] != first["metadata"]["annotations"]["gamma/request"]

    cluster.run("upgrade", "demo", CHART, "-f", upgraded, *wait(cluster))
    assert len(api.rollouts["demo-gamma-one"]) == 2  # the same values roll nothing

    cluster.run("rollback", "demo", "1", *wait(cluster))
    assert api.rollouts["demo-gamma-one"][-1] == first
    assert cluster.run("get", "manifest", "demo").stdout == former
    history = json.loads(cluster.run("history", "demo", "-o", "json").stdout)
    assert [entry["status"] for entry in history] == ["superseded"] * 3 + ["deployed"]

    for _ in range(2):  # the pod of the former test makes room
        tested = cluster.run("test", "demo", "--logs")
        assert "Succeeded" in tested.stdout
        assert tested.stdout.count("log of demo-gamma-test\n") == 1

    cluster.run("uninstall", "demo")
    left = [item["metadata"]["name"] for item in api.objects.values() if item["kind"] != "Namespace"]
    assert left == ["demo-gamma-test"]  # as helm leaves every pod of a test


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_installs(helm4, api, tmp_path, name):
    cluster_of(helm4, api, tmp_path).run("install", "demo", CHART, "-f", EXAMPLES[name])
    assert api.objects


def test_a_body_that_the_api_refuses_fails_the_install(cluster, tmp_path):
    broken = {"extraContainers": [{"name": "x", "image": "busybox:1", "ports": [{"containerPort": "80"}]}]}
    done = cluster.run("install", "demo", CHART, "-f", write(tmp_path, allocation() | broken), check=False)
    assert done.returncode != 0
    assert "80" in done.stderr


def test_upgrade_of_every_kind_of_setting_keeps_the_selectors(cluster, api):
    """Selectors can never change in a cluster, so no value may reach them."""
    cluster.run("install", "demo", CHART, "-f", EXAMPLES["one-gpu"])
    changes = [
        "commonLabels.a=b,podLabels.a=b,podAnnotations.a=b,images.vllm.tag=9.9,rollout.maxSurge=1",
        "sidecar.enabled=false,monitoring.rules.enabled=true,autoscaling.type=hpa,prepare.extraArgs={--json}",
    ]
    for change in changes:
        cluster.run("upgrade", "demo", CHART, "-f", EXAMPLES["one-gpu"], "--set", change)
    assert len(api.rollouts["demo-gamma-qwen3-32b"]) == 3


def test_kept_claims_outlive_the_release(cluster, api):
    cluster.run("install", "demo", CHART, "-f", EXAMPLES["mig"])
    cluster.run("uninstall", "demo")
    assert [item["kind"] for item in api.objects.values()] == ["PersistentVolumeClaim"]


def test_dry_run_on_the_server(cluster, api):
    done = cluster.run("install", "demo", CHART, "-f", EXAMPLES["one-gpu"], "--dry-run=server", "-o", "json")
    objects = [item for item in yaml.safe_load_all(json.loads(done.stdout)["manifest"]) if item]
    assert len(by_kind(objects, "Deployment")) == 1
    assert not api.of_kind("Deployment")
