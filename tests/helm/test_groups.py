"""Allocations of several nodes: LeaderWorkerSets, as their controller takes them."""

from pathlib import Path

import pytest

from tests.helm.charts import allocation, by_kind, pod_templates, render
from tests.helm.validation import check_object


def group_of(helm, **changes):
    """Leader and worker of an allocation of two nodes, and all objects."""
    objects = render(helm, allocation(**{"gpu": "h100", "count": 8, "nodes": 2} | changes))
    (group,) = by_kind(objects, "LeaderWorkerSet")
    assert not by_kind(objects, "Deployment", "serving")
    return *(template["spec"] for template in pod_templates(group)), objects


def test_several_nodes_serve_as_one(helm4):
    """Each prepares for a plan of all GPUs, and is told its place; the first answers, for all."""
    leader, worker, objects = group_of(helm4)
    for pod in (leader, worker):
        (prepare,) = pod["initContainers"]
        assert {"--tensor-parallel-size=8", "--pipeline-parallel-size=2"} <= set(prepare["args"])
        vllm = pod["containers"][0]
        assert vllm["resources"]["limits"]["nvidia.com/gpu"] == 8
        place = ["--nnodes=$(LWS_GROUP_SIZE)", "--node-rank=$(LWS_WORKER_INDEX)", "--master-addr=$(LWS_LEADER_ADDRESS)"]
        assert [word for word in vllm["args"] if "LWS" in word] == place
        assert "VLLM_HOST_IP" in [variable["name"] for variable in vllm["env"]]
    assert [c["name"] for c in leader["containers"]] == ["vllm", "sidecar"]
    assert [c["name"] for c in worker["containers"]] == ["vllm"]
    assert "--headless" in worker["containers"][0]["args"]
    assert "--headless" not in leader["containers"][0]["args"]
    assert not {"ports", "startupProbe", "livenessProbe", "readinessProbe"} & set(worker["containers"][0])
    (service,) = by_kind(objects, "Service")
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    (policy,) = [p for p in by_kind(objects, "NetworkPolicy") if p["metadata"]["name"].endswith("serving")]
    among = {"podSelector": {"matchLabels": policy["spec"]["podSelector"]["matchLabels"]}}
    assert {"from": [among]} in policy["spec"]["ingress"]
    assert {"to": [among]} in policy["spec"]["egress"]


def test_vllm_knows_what_the_nodes_are_told():
    vllm = pytest.importorskip("vllm")
    root = Path(vllm.__file__).parent
    source = "".join(path.read_text() for path in (root / "engine" / "arg_utils.py", *root.rglob("serve.py")))
    for option in ("--nnodes", "--node-rank", "--master-addr", "--pipeline-parallel-size"):
        assert f'"{option}"' in source, option
    assert "args.headless" in source


def test_a_group_scales_and_rolls_like_others(helm4):
    keda = {"type": "keda", "keda": {"serverAddress": "http://p:9090"}}
    for autoscaling, kind in (({"type": "hpa"}, "HorizontalPodAutoscaler"), (keda, "ScaledObject")):
        *_, objects = group_of(helm4, autoscaling=autoscaling, rollout={"maxSurge": 1})
        for item in objects:
            check_object(item, "1.34")
        (scaler,) = by_kind(objects, kind)
        wanted = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": "demo-gamma-one"}
        assert scaler["spec"]["scaleTargetRef"] == wanted
        (group,) = by_kind(objects, "LeaderWorkerSet")
        assert "replicas" not in group["spec"]
        assert group["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"] == {"maxSurge": 1, "maxUnavailable": 1}


def test_the_pods_of_a_group_find_their_leader(helm4):
    """By a headless Service that the controller makes unless there is one of that name: NAME-0 for the first group
    where each has its own, NAME where all share one (pkg/controllers of lws 0.9)."""
    *_, objects = group_of(helm4, replicas=2)
    (group,) = by_kind(objects, "LeaderWorkerSet")
    name, policy = group["metadata"]["name"], group["spec"].get("networkConfig", {}).get("subdomainPolicy", "Shared")
    made = {name} if policy == "Shared" else {f"{name}-0", f"{name}-1"}
    assert not made & {service["metadata"]["name"] for service in by_kind(objects, "Service")}
