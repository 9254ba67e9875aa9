"""Wrong values are refused before anything is installed, with the place named: by schema or by the chart's checks."""

import argparse
import json

import pytest
import yaml

from allocator.cli.prepare import add_arguments
from allocator.plan import find_gpu, load_catalogue
from allocator.plan.vllm_arguments import PLANNED_OPTIONS
from tests.helm.charts import CHART, CLOUDS, EXAMPLES, Helm, allocation, by_kind, fail, render

ONE = "allocations"
# What is wrong -> (path in the values, wrong value, word that the refusal has to name).
BY_SCHEMA = {
    "unknown key": ("replicaCount", 2, "replicaCount"),
    "unknown key of a section": ("vllm.prot", 8000, "prot"),
    "unknown key of an allocation": (f"{ONE}.0.maxModelLength", 4096, "maxModelLength"),
    "unknown key of a profile": ("gpuProfiles.l4.gpuName", "l4", "gpuProfiles"),
    "allocations as a map": (ONE, {"one": {}}, ONE),
    "no model": (f"{ONE}.0", {"name": "one", "gpu": "l4"}, "model"),
    "no gpu": (f"{ONE}.0", {"name": "one", "model": "m"}, "gpu"),
    "no name": (f"{ONE}.0", {"gpu": "l4", "model": "m"}, "name"),
    "name with capitals": (f"{ONE}.0.name", "Qwen3", "name"),
    "name too long": (f"{ONE}.0.name", "a" * 33, "name"),
    "name that ends in a dash": (f"{ONE}.0.name", "one-", "name"),
    "model with a space": (f"{ONE}.0.model", "Qwen 3", "model"),
    "model that looks like a flag": (f"{ONE}.0.model", "--help", "model"),
    "no GPU at all": (f"{ONE}.0.count", 0, "count"),
    "count as text": (f"{ONE}.0.count", "2", "count"),
    "fractional GPU": (f"{ONE}.0.count", 0.5, "count"),
    "negative replicas": (f"{ONE}.0.replicas", -1, "replicas"),
    "context as text": (f"{ONE}.0.maxModelLen", "32k", "maxModelLen"),
    "context of zero": (f"{ONE}.0.maxModelLen", 0, "maxModelLen"),
    "no sequences": (f"{ONE}.0.maxNumSeqs", 0, "maxNumSeqs"),
    "host with capitals": (f"{ONE}.0.host", "LLM.example.com", "host"),
    "gateway without a name": ("httpRoute.parentRefs", [{"namespace": "gateway"}], "parentRefs"),
    "timeout in words": ("httpRoute.requestTimeout", "10 minutes", "requestTimeout"),
    "checkpoint over http": (f"{ONE}.0.checkpoint", "https://x/y", "checkpoint"),
    "checkpoint of nobody": (f"{ONE}.0.checkpoint", "hf://name", "checkpoint"),
    "unknown fusion": (f"{ONE}.0.fusion", "loose", "fusion"),
    "adapters as a number": (f"{ONE}.0.lora", 4, "lora"),
    "rank that vLLM has not": (f"{ONE}.0.lora", {"maxLoraRank": 48}, "maxLoraRank"),
    "unknown KV type": (f"{ONE}.0.kvCacheDtype", "int8", "kvCacheDtype"),
    "budget without a unit": (f"{ONE}.0.budget", "17", "budget"),
    "budget as a number": (f"{ONE}.0.budget", 17, "budget"),
    "negative budget": (f"{ONE}.0.budget", "-5GiB", "budget"),
    "unknown unit": (f"{ONE}.0.budget", "5Gi", "budget"),
    "cut digest": (f"{ONE}.0.budget", "sha256:abc", "budget"),
    "more than the whole memory": (f"{ONE}.0.gpuMemoryUtilization", 1.1, "gpuMemoryUtilization"),
    "none of the memory": ("vllm.gpuMemoryUtilization", 0, "gpuMemoryUtilization"),
    "arguments as text": (f"{ONE}.0.vllmArgs", "--enforce-eager", "vllmArgs"),
    "store over http": ("store.url", "http://models/gamma", "url"),
    "store as a path": ("store.url", "/store", "url"),
    "secret name with a slash": ("hub.tokenSecret", "a/b", "tokenSecret"),
    "digest of an image": ("images.vllm.digest", "abc", "digest"),
    "tag with a space": ("images.vllm.tag", "a b", "tag"),
    "pull policy": ("images.vllm.pullPolicy", "Sometimes", "pullPolicy"),
    "prepare mode": ("prepare.mode", "job", "mode"),
    "port": ("vllm.port", 70000, "port"),
    "boolean as text": ("sidecar.enabled", "yes", "enabled"),
    "memory with a wrong unit": ("vllm.resources", {"requests": {"memory": "16GB"}}, "resources"),
    "size with a wrong unit": ("modelVolume.size", "100GiB", "size"),
    "volume type": ("modelVolume.type", "hostPath", "type"),
    "access mode": ("modelVolume.accessModes", ["RWX"], "accessModes"),
    "surge of a fraction": ("rollout.maxSurge", 0.5, "maxSurge"),
    "surge of 200 %": ("rollout.maxSurge", "200%", "maxSurge"),
    "autoscaler": ("autoscaling.type", "vpa", "type"),
    "address of Prometheus": ("autoscaling.keda.serverAddress", "prometheus:9090", "serverAddress"),
    "toleration effect": ("tolerations", [{"key": "a", "effect": "Never"}], "tolerations"),
    "policy of the router": ("router.policy", "prefix", "policy"),
    "failure of the picker": ("inferencePool.failureMode", "FailClosed", "failureMode"),
    "size of the node cache": ("nodeCache.size", "500Gi", "size"),
    "scrape interval": ("monitoring.serviceMonitor.interval", "30 sec", "interval"),
    "label that is no text": ("podLabels", {"a": 1}, "podLabels"),
    "service type": ("service.type", "Ingress", "type"),
    "environment without a name": ("vllm.extraEnv", [{"value": "1"}], "extraEnv"),
    "negative time": ("vllm.startupTimeoutSeconds", -1, "startupTimeoutSeconds"),
    "name of the release": ("fullnameOverride", "GAMMA", "fullnameOverride"),
}
KEDA = {"type": "keda", "keda": {"serverAddress": "http://p:9090"}}
# What is wrong -> (values, words of the refusal).
BY_CHECK = {
    "nothing to deploy": ({}, "nothing to deploy"),
    "no store": ({**allocation(), "store": {"url": ""}}, "store.url is empty"),
    "file store without volume": (
        {**allocation(), "store": {"url": "file:///store"}},
        "store.volume is empty",
    ),
    "volume without file store": (
        {**allocation(), "store": {"url": "s3://a/b", "volume": {"emptyDir": {}}}},
        "use file:///store",
    ),
    "unknown GPU": (allocation(gpu="rtx9090"), 'no GPU profile "rtx9090"; known are a100-40gb'),
    "two of one name": (
        {"store": {"url": "s3://a/b"}, "allocations": [{"name": "a", "model": "m", "gpu": "l4"}] * 2},
        "two allocations are named a",
    ),
    "no claim": ({**allocation(), "modelVolume": {"type": "existing"}}, "modelVolume.existingClaim"),
    "claim that is not used": ({**allocation(), "modelVolume": {"existingClaim": "a"}}, "set it to existing"),
    "nothing to serve": ({**allocation(), "prepare": {"mode": "none"}}, "the checkpoint must be there"),
    "read-only and prepared": (
        {**allocation(), "modelVolume": {"type": "existing", "existingClaim": "a", "readOnly": True}},
        "leaves no place for the checkpoint",
    ),
    "native without sidecar": (
        {**allocation(), "prepare": {"mode": "native"}, "sidecar": {"enabled": False}},
        "sidecar.enabled must be true",
    ),
    "native that must see the device": (
        {**allocation(gpu="any"), "prepare": {"mode": "native"}},
        "cannot see the device",
    ),
    "one port for two": ({**allocation(), "vllm": {"port": 8080}}, "are equal"),
    "MIG slices together": (allocation(gpu="h100-mig-3g.40gb", count=2), "MIG slices cannot work together"),
    "GPUs of a pod without a GPU": (allocation(gpu="cpu", count=2), "count is 2, but profile cpu has no resource"),
    "more GPUs than a node has": (allocation(gpu="l4", count=9), "count is 9, but a node of profile l4 has 8 GPUs"),
    "nodes without a GPU": (allocation(gpu="cpu", nodes=2), "nodes is 2, but profile cpu has no resource"),
    "nodes of MIG slices": (allocation(gpu="h100-mig-3g.40gb", nodes=2), "MIG slices cannot work together"),
    "nodes that wait for the first": (
        {**allocation(nodes=2), "prepare": {"mode": "native"}},
        "set prepare.mode to init",
    ),
    "nodes and a long name": (
        allocation(nodes=2, name="a" * 32) | {"fullnameOverride": "r" * 20},
        "53 characters, of which 48 may be",
    ),
    "Services that begin with a digit": (allocation() | {"fullnameOverride": "7b"}, "set fullnameOverride"),
    "one-pod claim, two nodes": ({**allocation(nodes=2), "modelVolume": {"type": "pvc"}}, "serves one pod at a time"),
    "nodes by argument": (
        allocation(vllmArgs=["--nnodes=2"]),
        "argument --nnodes=2 for vllm is the chart's; set nodes",
    ),
    "pipeline by argument": (allocation(vllmArgs=["-pp=2"]), "contradicts what is planned; set nodes"),
    "more GPUs to learn with than a node has": (
        {"store": {"url": "s3://a/b"}, "learn": {"enabled": True, "model": "m", "gpu": "l4", "count": 16}},
        "learn.count is 16",
    ),
    "context of vLLM that was not planned": (
        allocation(vllmArgs=["--max-model-len=32768"]),
        "argument --max-model-len=32768 for vllm contradicts what is planned; set maxModelLen of the allocation",
    ),
    "the same with underscores": (allocation(vllmArgs=["--max_num_seqs", "64"]), "set maxNumSeqs of the allocation"),
    "the same in short": (
        allocation(vllmArgs=["-tp=2"]),
        "argument -tp=2 for vllm contradicts what is planned; set count",
    ),
    "the same for all": (
        {**allocation(), "vllm": {"extraArgs": ["--kv-cache-dtype=fp8"]}},
        "set kvCacheDtype of the allocation",
    ),
    "adapters that were not planned": (allocation(vllmArgs=["--enable-lora"]), "set lora of the allocation"),
    "port of vLLM": (allocation(vllmArgs=["--port=9000"]), "is the chart's; set vllm.port"),
    "two budgets": (
        allocation(prepareArgs=["--budget=3bits"]),
        "argument --budget=3bits for gamma prepare is the chart's",
    ),
    "one-pod claim, two pods": (
        {**allocation(replicas=2), "modelVolume": {"type": "pvc"}},
        "serves one pod at a time",
    ),
    "one-pod claim, surge": (
        {**allocation(rollout={"maxSurge": 1}), "modelVolume": {"type": "pvc"}},
        "serves one pod at a time",
    ),
    "KV cache to choose, budget given": (
        allocation(kvCacheDtype="auto-choose", budget="17GiB"),
        "budget must be auto, not 17GiB",
    ),
    "rollout that cannot go on": (allocation(rollout={"maxUnavailable": 0}), "both 0"),
    "replicas and autoscaling": (allocation(replicas=2, autoscaling=KEDA), "both set"),
    "fewest above most": (allocation(autoscaling=KEDA | {"minReplicas": 9}), "minReplicas 9 is above"),
    "to zero without a queue": (allocation(autoscaling=KEDA | {"minReplicas": 0}), "minReplicas 0 needs"),
    "to zero by HPA": (allocation(autoscaling={"type": "hpa", "minReplicas": 0}), "minReplicas 0 needs"),
    "woken, and never asleep": (
        allocation(autoscaling=KEDA | {"keda": KEDA["keda"] | {"wakeQuery": "q"}}),
        "keda.wakeQuery wakes an allocation of minReplicas 0",
    ),
    "no Prometheus": (allocation(autoscaling={"type": "keda"}), "serverAddress is empty"),
    "from outside, by no name": (
        {**allocation(), "ingress": {"enabled": True}, "networkPolicy": {"enabled": False}},
        "allocation one: ingress.enabled is true, but nothing says its host",
    ),
    "from outside, through a closed door": (
        {**allocation(), "ingress": {"enabled": True, "domain": "a.b"}},
        "the NetworkPolicy admits nobody from outside",
    ),
    "from outside, two of one name": (
        {
            "store": {"url": "s3://a/b"},
            "allocations": [{"name": n, "model": "m", "gpu": "l4", "host": "a.b"} for n in ("left", "right")],
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]},
            "networkPolicy": {"enabled": False},
        },
        "allocation right: host a.b is another allocation's too",
    ),
    "route without a gateway": (
        {**allocation(), "httpRoute": {"enabled": True, "domain": "a.b"}, "networkPolicy": {"enabled": False}},
        "httpRoute.parentRefs is empty",
    ),
    "budget of a finished checkpoint": (
        allocation(checkpoint="hf://org/name", budget="3bits"),
        "its checkpoint is finished, so that budget",
    ),
    "KV cache of a finished checkpoint": (
        allocation(checkpoint="hf://org/name", kvCacheDtype="auto-choose"),
        "is decided with the weights",
    ),
    "hub, and none": ({**allocation(checkpoint="hf://org/name"), "hub": {"offline": True}}, "hub.offline is true"),
    "GPUs twice": (
        {**allocation(), "gpuProfiles": {"l4": {"deviceClass": "gpu.nvidia.com"}}},
        "gpuProfiles.l4 has resource and deviceClass",
    ),
    "router and pool": (
        {**allocation(), "router": {"enabled": True}, "inferencePool": {"enabled": True}},
        "router and inferencePool would both choose the pod",
    ),
    "router's ports": ({**allocation(), "router": {"metricsPort": 8000}}, "router.metricsPort are equal"),
    "two places for checkpoints": (
        {**allocation(), "modelVolume": {"type": "pvc"}, "nodeCache": {"volume": {"hostPath": {"path": "/a"}}}},
        "are two places for checkpoints",
    ),
    "node cache of a native sidecar": (
        {**allocation(), "prepare": {"mode": "native"}, "nodeCache": {"volume": {"hostPath": {"path": "/a"}}}},
        "nodeCache needs prepare.mode init",
    ),
    "node cache without a sidecar": (
        {**allocation(), "sidecar": {"enabled": False}, "nodeCache": {"volume": {"hostPath": {"path": "/a"}}}},
        "nodeCache needs sidecar.enabled",
    ),
    "learn what": ({"store": {"url": "s3://a/b"}, "learn": {"enabled": True}}, "learn.model is empty"),
    "learn where": (
        {"store": {"url": "s3://a/b"}, "learn": {"enabled": True, "model": "m", "gpu": "x"}},
        'learn: no GPU profile "x"',
    ),
}


def changed(path, value):
    """Values that are right but for one place."""
    values = allocation()
    *way, last = path.split(".")
    at = values
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at.setdefault(step, {})
    at[int(last) if isinstance(at, list) else last] = value
    return values


def test_the_table_is_long_and_its_start_is_right(helm):
    assert len(BY_SCHEMA) >= 40
    render(helm, allocation())


@pytest.mark.parametrize("case", BY_SCHEMA)
def test_schema_refuses(helm, case):
    path, value, word = BY_SCHEMA[case]
    refusal = fail(helm, changed(path, value))
    assert "schema" in refusal  # and not a template that stumbled
    assert word in refusal


@pytest.mark.parametrize("case", BY_CHECK)
def test_check_refuses(helm4, case):
    values, words = BY_CHECK[case]
    refusal = fail(helm4, values)
    assert "values that cannot work" in refusal
    assert words in refusal


def options_of(helm, name):
    """What a named template of the chart lists."""
    template = '{{ include "' + name + '" . | fromYaml | keys | sortAlpha | toJson }}'
    own = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: asked}}\ndata:\n  names: '{template}'\n"
    (found,) = by_kind(render(helm, allocation() | {"extraObjects": [own], "test": {"enabled": False}}), "ConfigMap")
    return json.loads(found["data"]["names"])


def test_what_is_refused_is_what_the_programs_plan(helm4):
    assert options_of(helm4, "gamma.plannedOptions") == sorted(PLANNED_OPTIONS)
    prepare = argparse.ArgumentParser()
    add_arguments(prepare)
    assert set(options_of(helm4, "gamma.givenOptions")) <= {
        a.removeprefix("--") for a in prepare._option_string_actions
    }


def test_other_arguments_are_taken(helm4):
    taken = [
        "--enforce-eager",
        "--tool-call-parser=hermes",
        "--lora-modules",
        "sql=/model/sql",
        "value-of--max-model-len",
    ]
    objects = render(helm4, allocation(vllmArgs=taken, prepareArgs=["--max-num-batched-tokens=4096"]))
    (deployment,) = by_kind(objects, "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    assert spec["containers"][0]["args"][-5:] == taken
    assert [f"--vllm-arg={argument}" for argument in taken] == spec["initContainers"][0]["args"][-5:]


def test_a_checkpoint_that_nobody_planned_here_is_served_as_one_likes(helm4):
    values = {"prepare": {"mode": "none"}, "modelVolume": {"type": "existing", "existingClaim": "a"}}
    assert render(helm4, allocation(vllmArgs=["--max-model-len=32768"]) | values)


def test_all_mistakes_are_told_at_once():
    refusal = fail(Helm("helm3"), allocation(gpu="x", rollout={"maxUnavailable": 0}) | {"store": {"url": ""}})
    assert all(words in refusal for words in ("store.url is empty", 'no GPU profile "x"', "both 0"))


def test_lint_tells_of_wrong_values(helm):
    done = helm.run("lint", "--strict", CHART, "-f", EXAMPLES["one-gpu"], "--set", "vllm.port=http", check=False)
    assert done.returncode != 0
    assert "port" in done.stdout + done.stderr


def test_profiles_are_those_of_the_catalogue(helm4):
    """Every `catalogue` names a card that `gamma prepare --gpu` knows, with the label that its nodes carry."""

    catalogue = load_catalogue()
    seen = 0
    for path in (CHART / "values.yaml", *CLOUDS.values()):
        for name, profile in yaml.safe_load(path.read_text())["gpuProfiles"].items():
            card = (profile or {}).get("catalogue", "auto")
            if card == "auto":
                continue
            gpu = find_gpu(card, catalogue)
            label = (profile.get("nodeSelector") or {}).get("nvidia.com/gpu.product")
            assert label in (None, gpu.product_label), name
            if path.name == "values.yaml":  # a cloud may name all slices alike
                assert profile["resource"] == gpu.resource, name
            seen += 1
    assert seen >= 10
