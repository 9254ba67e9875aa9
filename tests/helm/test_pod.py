"""The rendered pods run: learning, preparing, serving, a new budget and the way back, with real processes.

helm installs to an API in memory; the pods that it would start are started here. See tests/helm/pod.py for what of a
pod is real.
"""

import json
import re
import socket
import subprocess
import sys

import pytest
import yaml

from tests.helm.charts import CHART, by_kind, render
from tests.helm.kubernetes_api import KubernetesApi
from tests.helm.pod import ROOT, Pod, fetch
from tests.helm.test_lifecycle import cluster_of
from tests.helm.test_monitoring import ENABLED, metrics_in, queries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DEMO = ROOT / "benchmarks" / "demo"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def values():
    """The example for CPUs, with ports that are free here and a learning that takes seconds."""
    example = yaml.safe_load((CHART / "examples" / "cpu.yaml").read_text())
    example["allocations"][0]["vllmArgs"] = ["--enforce-eager"]
    example["gpuProfiles"] = {"cpu": {"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}}
    example["vllm"] |= {"port": free_port()}
    example["sidecar"] = {"port": free_port()}
    example["extraVolumes"] = [{"name": "models", "hostPath": {"path": str(DEMO)}}]
    example["extraVolumeMounts"] = [{"name": "models", "mountPath": "/models"}]
    example["modelVolume"] = {"type": "existing", "existingClaim": "models"}
    quick = ["--quantizer=rtn", "--group-size=64", "--sequences=4", "--sequence-length=64"]
    return (
        example
        | ENABLED
        | {"learn": {"enabled": True, "model": "/models/model", "name": "demo", "gpu": "cpu", "args": quick}}
    )


@pytest.fixture(scope="module")
def store(values, tmp_path_factory):
    """A store that the Job of the chart filled."""
    from tests.helm.charts import Helm

    folder = tmp_path_factory.mktemp("store")
    (job,) = by_kind(render(Helm("helm4"), values), "Job")
    with Pod(job["spec"]["template"], {"store": folder}, tmp_path_factory.mktemp("learn")) as pod:
        pod.complete()
    return folder


@pytest.fixture(scope="module")
def api():
    with KubernetesApi() as running:
        yield running


def with_budget(values, budget, tmp_path):
    changed = values | {"allocations": [values["allocations"][0] | {"budget": budget}]}
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(changed))
    return path


def served_manifest(url):
    """The digest in vLLM's metrics."""
    status, text = fetch(f"{url}/metrics")
    assert status == 200
    return re.search(r'^gamma_manifest_info\{.*manifest="(sha256:[0-9a-f]+)"', text, re.MULTILINE)[1]


def exported(text):
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def test_install_serve_upgrade_roll_back(helm4, api, values, store, tmp_path):
    pytest.importorskip("vllm")
    helm = cluster_of(helm4, api, tmp_path)
    model_volume = tmp_path / "claim"

    def pod(name):
        template = api.rollouts["demo-gamma-demo"][-1]
        return Pod(template, {"store": store, "model": model_volume}, tmp_path / name)

    helm.run("install", "demo", CHART, "-f", with_budget(values, "3.5bits", tmp_path))
    with pod("first") as first:
        first.start()
        vllm, sidecar = first.spec["containers"]
        url, sidecar_url = first.url(vllm, "http"), first.url(sidecar, "sidecar")
        assert first.probe(vllm, "livenessProbe")
        assert first.probe(sidecar, "livenessProbe")

        # What `helm test` would run, on the address that this pod has here.
        (hook,) = by_kind(render(helm4, values), "Pod", "test")
        script = hook["spec"]["containers"][0]["command"][-1]
        check = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True)
        assert check.returncode == 0, check.stdout
        assert check.stdout.startswith(f"ok {url} demo: ")

        request = {"model": "demo", "prompt": "The old man", "max_tokens": 8, "temperature": 0}
        status, answer = fetch(f"{url}/v1/completions", 60, json.dumps(request).encode())
        assert status == 200
        assert json.loads(answer)["usage"]["completion_tokens"] == 8

        old_manifest = served_manifest(url)
        check_metrics(render(helm4, values), fetch(f"{url}/metrics")[1], fetch(f"{sidecar_url}/metrics")[1])
        assert fetch(f"{sidecar_url}/v1/models")[0] == 200  # as by port-forward, without a token
    folders = {path.name for path in model_volume.iterdir() if path.name.startswith("demo-")}

    helm.run("upgrade", "demo", CHART, "-f", with_budget(values, "2.5bits", tmp_path))
    with pod("second") as second:
        second.start()
        new_manifest = served_manifest(url)
    assert new_manifest != old_manifest
    assert folders < {path.name for path in model_volume.iterdir()}  # the former checkpoint is kept

    helm.run("rollback", "demo", "1")
    assert api.rollouts["demo-gamma-demo"][-1] == api.rollouts["demo-gamma-demo"][0]
    with pod("third") as third:
        (prepare,) = third.spec["initContainers"]
        third.begin(prepare).wait()
        assert "already prepared" in third.log("prepare")
        assert old_manifest in third.log("prepare")


def check_metrics(objects, of_vllm, of_sidecar):
    """Every metric that rules, dashboard and autoscaler name is there in a live server."""
    (rules,) = by_kind(objects, "PrometheusRule")
    (dashboard,) = by_kind(objects, "ConfigMap", "monitoring")
    expressions = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    expressions += queries(json.loads(dashboard["data"]["gamma.json"]))
    there = exported(of_vllm) | exported(of_sidecar)
    for name in metrics_in(expressions) - {"up"}:
        family = re.sub("_(bucket|count|sum)$", "", name)
        assert {name, family} & there, name


def test_native_sidecar_prepares_and_stays(helm4, values, store, tmp_path):
    """vLLM would start once the sidecar's startup probe answers; the folder is complete by then."""
    changed = values | {"prepare": {"mode": "native"}}
    (deployment,) = by_kind(render(helm4, changed), "Deployment")
    template = deployment["spec"]["template"]
    with Pod(template, {"store": store}, tmp_path / "pod") as pod:
        (sidecar,) = pod.spec["initContainers"]
        pod.begin(sidecar)
        pod.wait(sidecar, "startupProbe")
        (config,) = (pod.volumes["model"] / "x").parent.glob("demo-*/vllm.yaml")
        assert yaml.safe_load(config.read_text())["served-model-name"] == "demo"
        assert pod.probe(sidecar, "readinessProbe")
        assert config.parent.name == pod.spec["containers"][0]["args"][1].split("/")[-2]


def test_pods_that_share_a_volume_prepare_it_once(helm4, values, store, tmp_path):
    (deployment,) = by_kind(render(helm4, values), "Deployment")
    pods = [
        Pod(deployment["spec"]["template"], {"store": store, "model": tmp_path / "claim"}, tmp_path / str(number))
        for number in range(3)
    ]
    with pods[0], pods[1], pods[2]:
        running = [pod.begin(pod.spec["initContainers"][0]) for pod in pods]
        assert [process.wait() for process in running] == [0, 0, 0], [pod.log("prepare") for pod in pods]
        assert sum("already prepared" in pod.log("prepare") for pod in pods) == 2


def test_a_budget_that_does_not_fit_is_told_in_the_log_of_prepare(helm4, values, store, tmp_path):
    changed = values | {"allocations": [values["allocations"][0] | {"budget": "1MB"}]}
    (deployment,) = by_kind(render(helm4, changed), "Deployment")
    with Pod(deployment["spec"]["template"], {"store": store}, tmp_path / "pod") as pod:
        assert pod.begin(pod.spec["initContainers"][0]).wait() == 4
        assert "raise the budget" in pod.log("prepare") or "smallest" in pod.log("prepare")
