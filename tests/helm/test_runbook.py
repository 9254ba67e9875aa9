"""What docs/operations.md tells to do on an alert exists, is taken by chart and programs, and has its effect."""

import argparse
import json
import re

import pytest
import yaml

from allocator.cli import prepare, sidecar
from allocator.cli.deployment import prepare_settings
from allocator.contract.errors import ContractError, InfeasibleBudgetError, InputError
from allocator.plan import PlanRequest, find_gpu, make_plan
from tests.configs import shape_of
from tests.helm.charts import CHART, CLOUDS, allocation, by_kind, render

TEXT = (CHART.parents[1] / "docs" / "operations.md").read_text()
ALERTS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL))
ON_L40S, ON_L4 = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
FIELDS = json.loads((CHART / "values.schema.json").read_text())["definitions"]["allocation"]["properties"]
# An allocation that fits with something to spare, so that every remedy can be seen.
TIGHT = {"gpu": "l4", "maxModelLen": 16384, "maxNumSeqs": 4, "lora": {"maxLoras": 4, "maxLoraRank": 64}}


def pod_of(helm, values):
    (deployment,) = by_kind(render(helm, values), "Deployment", "serving")
    return deployment["spec"]["template"]


def parsed(verb, container):
    parser = argparse.ArgumentParser(exit_on_error=False)
    verb.add_arguments(parser)
    return parser.parse_args(container["args"])


def plan_of(helm, **changes):
    """The plan that the pod of the changed allocation makes."""
    (container,) = pod_of(helm, allocation(**TIGHT | changes))["spec"]["initContainers"]
    asked = prepare_settings(parsed(prepare, container))
    request = PlanRequest(
        max_model_len=asked.max_model_len, max_num_seqs=asked.max_num_seqs, kv_cache_dtype=asked.kv_cache_dtype,
        gpu_memory_utilization=asked.gpu_memory_utilization, lora=asked.lora,
    )  # fmt: skip
    return make_plan(shape_of("llama-3.1-8b"), find_gpu(asked.gpu), request)


def headroom(plan):
    return plan.weight_budget_bytes - plan.smallest_weight_bytes


@pytest.mark.parametrize("values", [ON_L40S, ON_L4], ids=["l40s", "l4"])
def test_the_values_of_two_clusters_are_taken_and_their_plans_fit(helm, values):
    deployments = by_kind(render(helm, CLOUDS["eks"], values), "Deployment", "serving")
    containers = {item["metadata"]["name"]: item["spec"]["template"]["spec"]["initContainers"] for item in deployments}
    for one in values["allocations"]:
        (container,) = containers[f"demo-gamma-{one['name']}"]
        asked = prepare_settings(parsed(prepare, container))
        request = PlanRequest(
            max_model_len=asked.max_model_len, max_num_seqs=asked.max_num_seqs, kv_cache_dtype=asked.kv_cache_dtype,
            tensor_parallel_size=one.get("count", 1), gpu_memory_utilization=asked.gpu_memory_utilization,
        )  # fmt: skip
        plan = make_plan(shape_of(one["model"].lower()), find_gpu(asked.gpu), request)
        assert headroom(plan) > 0


@pytest.mark.parametrize("alert", ALERTS)
def test_values_that_are_named_exist(alert):
    for quoted in re.findall(r"`([^`]+)`", ALERTS[alert]):
        path = quoted.partition(":")[0]
        if not re.fullmatch(r"(?!gamma_)[a-z]\w*(\.\w+)*", path) or path in ("prepare", "vllm", "sidecar", "manifest"):
            continue
        at = {**VALUES, **{name: VALUES.get(name, {}) for name in FIELDS}}
        for step in path.split("."):
            assert step in at, f"{alert}: {quoted}"
            at = at[step]


def test_there_is_a_remedy_for_every_alert_that_this_file_knows():
    assert {"GammaAllocationDown", "GammaKvCacheFull", "GammaHeadroomLow", "GammaSolverTimeLimit"} <= set(ALERTS)


def test_pods_and_containers_are_found_by_the_names_that_are_told(helm4):
    pod = pod_of(helm4, allocation())
    assert pod["metadata"]["labels"]["gamma/allocation"] == "one"
    assert {"gamma/request"} <= set(pod["metadata"]["annotations"])
    names = {c["name"] for c in [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]}
    told = set(re.findall(r"logs -c (\w+)", " ".join(ALERTS.values())))
    assert told == names == {"prepare", "vllm", "sidecar"}


def test_exit_codes_of_prepare_mean_what_is_told():
    codes = {2: InputError, 3: ContractError, 4: InfeasibleBudgetError}
    assert {error.exit_code: error for error in codes.values()} == codes
    assert (
        "exit code 2 is a wrong value, 3 a\ndamaged file in the store, 4 does not fit" in ALERTS["GammaAllocationDown"]
    )


def test_out_of_memory_is_met_by_a_smaller_share(helm4):
    share = VALUES["vllm"]["gpuMemoryUtilization"]
    before, after = plan_of(helm4), plan_of(helm4, gpuMemoryUtilization=round(share - 0.02, 2))
    assert after.line("vLLM may use").nbytes < before.line("vLLM may use").nbytes
    assert after.weight_budget_bytes < before.weight_budget_bytes
    assert after.verdict.fits


def test_queues_and_preemptions_are_met_by_more_pods_and_fewer_requests(helm4):
    (deployment,) = by_kind(render(helm4, allocation(replicas=3)), "Deployment", "serving")
    assert deployment["spec"]["replicas"] == 3
    scaled = allocation(autoscaling={"type": "hpa", "maxReplicas": 5})
    (scaler,) = by_kind(render(helm4, scaled), "HorizontalPodAutoscaler")
    assert scaler["spec"]["maxReplicas"] == 5
    (prepare_container,) = pod_of(helm4, allocation(maxNumSeqs=2))["spec"]["initContainers"]
    assert prepare_settings(parsed(prepare, prepare_container)).max_num_seqs == 2


def test_a_router_that_is_down_is_gone_past_or_doubled(helm4):
    objects = render(helm4, allocation(router={"enabled": True, "replicas": 2}))
    routers, serving = (by_kind(objects, "Service", part)[0]["metadata"]["name"] for part in ("router", "serving"))
    assert routers == f"{serving}-router"
    (router,) = by_kind(objects, "Deployment", "router")
    assert router["spec"]["replicas"] == 2
    (role,) = by_kind(objects, "Role")
    assert role["metadata"]["name"] == routers


def test_a_full_kv_cache_is_met_by_what_is_told(helm4):
    def tokens(plan, weights):
        left = plan.line("KV cache").nbytes + plan.weight_budget_bytes - weights
        return left // plan.kv_bytes_per_block

    before = plan_of(helm4)
    weights = before.weight_budget_bytes
    assert tokens(before, weights - 2**30) - tokens(before, weights) == 2**30 // before.kv_bytes_per_block
    fp8 = plan_of(helm4, kvCacheDtype="fp8")
    assert tokens(fp8, weights) > 1.5 * tokens(before, weights)
    assert plan_of(helm4, maxModelLen=8192).kv_blocks_per_sequence < before.kv_blocks_per_sequence


@pytest.mark.parametrize(
    "change",
    [
        {"maxModelLen": 8192},
        {"maxNumSeqs": 2},
        {"lora": {"maxLoras": 1, "maxLoraRank": 64}},
        {"lora": {"maxLoras": 4, "maxLoraRank": 8}},
        {"gpu": "l40s"},
    ],
    ids=str,
)
def test_low_headroom_is_met_by_what_is_told(helm4, change):
    assert headroom(plan_of(helm4, **change)) > headroom(plan_of(helm4)) > 0


def test_manifests_that_differ_are_met_by_a_pin(helm4):
    pinned = pod_of(helm4, allocation(budget="sha256:" + "0" * 64))["spec"]["initContainers"][0]
    assert parsed(prepare, pinned).budget == "sha256:" + "0" * 64


def test_a_solver_without_time_gets_more(helm4):
    (told,) = re.findall(r"`(sidecar\.extraArgs: .*?)`", ALERTS["GammaSolverTimeLimit"])
    arguments = yaml.safe_load(told.partition(":")[2])
    values = {"sidecar": {"extraArgs": arguments}, "clusterSidecar": {"enabled": True, "extraArgs": arguments}}
    objects = render(helm4, allocation() | values)
    for component in ("serving", "console"):
        (deployment,) = by_kind(objects, "Deployment", component)
        container = deployment["spec"]["template"]["spec"]["containers"][-1]
        assert parsed(sidecar, container).solver_seconds == 60
