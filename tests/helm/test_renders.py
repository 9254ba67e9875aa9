"""What the examples become: the same under helm 3 and 4 and every Kubernetes version, valid, and as written down."""

import argparse
import re
import shutil
from importlib import import_module

import jsonschema
import pytest
import yaml

from allocator.plan import PlanRequest
from tests.helm.charts import CHART, EXAMPLES, KUBERNETES, OLDEST, allocation, by_kind, pod_templates, render
from tests.helm.golden import CASES, GOLDEN, compact, expand
from tests.helm.validation import check_object


def versions_for(name):
    return KUBERNETES[KUBERNETES.index(OLDEST.get(name, KUBERNETES[0])) :]


@pytest.mark.parametrize("name", CASES)
def test_golden(helm, name):
    expected = list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))
    for kube in versions_for(name):
        rendered = compact(render(helm, *CASES[name], kube=kube))
        assert rendered == expected, (
            f"Kubernetes {kube}; is it meant? python -m tests.helm.golden, and look at the diff"
        )


@pytest.mark.parametrize("name", CASES)
def test_every_object_is_valid(name):
    objects = expand(list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text())))
    for kube in versions_for(name):
        for item in objects:
            check_object(item, kube)


def test_validation_would_see_a_mistake():
    objects = list(yaml.safe_load_all((GOLDEN / "cluster-virginia.yaml").read_text()))
    deployment = by_kind(objects, "Deployment")[0]
    deployment["spec"]["template"]["spec"]["containers"][0]["porst"] = []
    with pytest.raises(Exception, match="porst"):
        check_object(deployment, "1.34")
    monitor = by_kind(objects, "ServiceMonitor")[0]
    monitor["spec"]["endpoints"][0]["interval"] = "30 sec"
    with pytest.raises(jsonschema.ValidationError, match="30 sec"):
        check_object(monitor, "1.34")


def test_no_golden_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


def test_lint(helm):
    for values in EXAMPLES.values():
        helm.run("lint", "--strict", CHART, "-f", values, "--kube-version", KUBERNETES[-1])


def test_package(helm, tmp_path):
    helm.run("package", CHART, "-d", tmp_path)
    (package,) = tmp_path.glob("gamma-*.tgz")
    helm.run("template", "demo", package, "-f", EXAMPLES["one-gpu"])
    shutil.unpack_archive(package, tmp_path)
    assert not list((tmp_path / "gamma").rglob("*.py")) or [p.name for p in (tmp_path / "gamma").rglob("*.py")] == [
        "check.py"
    ]


def test_kubernetes_that_is_too_old_is_refused(helm):
    with pytest.raises(ValueError, match=r"1\.28"):
        render(helm, EXAMPLES["one-gpu"], kube="1.28")


def test_a_budget_changes_the_pods_and_nothing_else(helm4):
    """A rollout is what a new budget is for; other objects stay, and going back gives the former pods exactly."""
    before = render(helm4, allocation(budget="auto"))
    after = render(helm4, allocation(budget="5.5GiB"))
    assert before == render(helm4, allocation(budget="auto"))
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [a["kind"] for a, _ in changed] == ["Deployment"]
    (old, new) = (item["spec"].pop("template") for item in changed[0])
    assert [item["metadata"]["labels"].pop("gamma/budget") for item in changed[0]] == ["auto", "5.5GiB"]
    assert changed[0][0] == changed[0][1]
    assert old["metadata"]["annotations"]["gamma/request"] != new["metadata"]["annotations"]["gamma/request"]
    assert new["metadata"]["annotations"]["gamma/budget"] == "5.5GiB"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Qwen3-4B"},
        {"gpu": "h100"},
        {"count": 2},
        {"nodes": 2},
        {"maxModelLen": 8192},
        {"maxNumSeqs": 9},
        {"kvCacheDtype": "fp8"},
        {"budget": "sha256:" + "0" * 64},
        {"gpuMemoryUtilization": 0.8},
        {"fusion": "free"},
        {"lora": {"maxLoras": 2}},
    ],
    ids=lambda change: f"new-{next(iter(change))}",
)
def test_every_part_of_a_request_has_a_folder_of_its_own(helm4, change):
    """Pods of a former budget that share the volume keep their checkpoint."""

    def folder(objects):
        (template, *_) = [template for item in objects if item["kind"] != "Pod" for template in pod_templates(item)]
        return template["spec"]["containers"][0]["args"][1]

    assert folder(render(helm4, allocation())) != folder(render(helm4, allocation(**change)))


def test_chart_upgrade_alone_leaves_pods_as_they_are(helm4, tmp_path):
    copy = tmp_path / "gamma"
    shutil.copytree(CHART, copy)
    chart = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(chart.replace("\nversion: ", "\nversion: 9"))
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(allocation()))
    rendered = [
        list(yaml.safe_load_all(helm4.run("template", "demo", folder, "-f", values).stdout)) for folder in (CHART, copy)
    ]
    old, new = (by_kind(objects, "Deployment")[0] for objects in rendered)
    assert old["metadata"] != new["metadata"]
    assert old["spec"] == new["spec"]


def test_affinity_of_the_user_and_of_the_profile_both_hold(helm4):
    zone = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"]}
    mine = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [zone]}]}}
    objects = render(helm4, allocation(gpu="any-24gb") | {"affinity": {"nodeAffinity": mine}})
    spec = by_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    memory = {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["21999"]}
    assert required == {"nodeSelectorTerms": [{"matchExpressions": [zone, memory]}]}


def test_a_start_that_takes_as_long_as_allowed_is_no_failed_rollout(helm4):
    objects = render(helm4, allocation() | {"vllm": {"startupTimeoutSeconds": 3000}})
    spec = by_kind(objects, "Deployment")[0]["spec"]
    probe = spec["template"]["spec"]["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 3000
    assert spec["progressDeadlineSeconds"] > 3000 + 1800  # and the preparation


def test_a_profile_that_reads_the_device_gives_it_to_the_init_container(helm4):
    def limits(gpu):
        spec = by_kind(render(helm4, allocation(gpu=gpu)), "Deployment")[0]["spec"]["template"]["spec"]
        return spec["initContainers"][0]["resources"]["limits"]

    assert limits("any")["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in limits("l4")


def test_whoever_writes_the_checkpoint_has_the_resources_for_it(helm4):
    wanted = {"requests": {"cpu": "2", "memory": "9Gi"}, "limits": {"memory": "20Gi"}}
    for mode in ("init", "native"):
        prepare = {"mode": mode, "resources": wanted, "extraEnv": [{"name": "A", "value": "b"}]}
        (deployment,) = by_kind(render(helm4, allocation() | {"prepare": prepare}), "Deployment")
        (writer,) = deployment["spec"]["template"]["spec"]["initContainers"]
        assert writer["resources"] == wanted, mode
        assert {"name": "A", "value": "b"} in writer["env"], mode


def test_the_sidecar_knows_what_its_pod_serves(helm4):
    (deployment,) = by_kind(render(helm4, allocation()), "Deployment")
    vllm, sidecar = deployment["spec"]["template"]["spec"]["containers"]
    folder = vllm["args"][1].removesuffix("/vllm.yaml")
    assert f"--prepared={folder}" in sidecar["args"]
    assert {"name": "model", "mountPath": "/model", "readOnly": True} in sidecar["volumeMounts"]


def test_fusion_is_left_to_the_plan_where_there_is_a_gpu(helm4):
    def told(**changes):
        (deployment,) = by_kind(render(helm4, allocation(**changes)), "Deployment")
        return [a for a in deployment["spec"]["template"]["spec"]["initContainers"][0]["args"] if "fusion" in a]

    assert told() == ["--fusion=auto"]
    assert told(gpu="cpu") == ["--fusion=free"]
    assert told(gpu="cpu", fusion="tied") == ["--fusion=tied"]


def test_finished_checkpoints_are_served_as_they_are(helm4):
    image, hub = by_kind(render(helm4, EXAMPLES["ready-checkpoints"]), "Deployment")
    for deployment in (image, hub):
        assert "initContainers" not in deployment["spec"]["template"]["spec"]
    spec = image["spec"]["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "model"]
    assert volume["image"]["reference"] == "registry.example.com/models/qwen3-32b-gamma:3.5bits"
    (vllm,) = spec["containers"]
    assert vllm["args"][0] == "/model/checkpoint"
    assert {"name": "model", "mountPath": "/model", "readOnly": True} in vllm["volumeMounts"]
    (vllm,) = hub["spec"]["template"]["spec"]["containers"]
    assert vllm["args"][:2] == ["example/Qwen3-8B-gamma", "--revision=v1.2"]
    assert [a for a in vllm["args"] if "lora" in a] == ["--enable-lora", "--max-loras=2", "--max-lora-rank=32"]
    # The download goes where there is room for it, on a volume that may be written.
    (home,) = [variable["value"] for variable in vllm["env"] if variable["name"] == "HF_HOME"]
    (mount,) = [mount for mount in vllm["volumeMounts"] if home.startswith(mount["mountPath"] + "/")]
    assert not mount.get("readOnly")


def test_image_volumes_need_a_kubernetes_that_has_them(helm):
    with pytest.raises(ValueError, match=r"image volumes are of Kubernetes 1\.31"):
        render(helm, EXAMPLES["ready-checkpoints"], kube="1.30")


def test_devices_are_claimed_once_a_pod(helm4):
    objects = render(helm4, EXAMPLES["device-claims"])
    (template,) = by_kind(objects, "ResourceClaimTemplate")
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert (request["exactly"]["deviceClassName"], request["exactly"]["count"]) == ("gpu.nvidia.com", 2)
    assert len(request["exactly"]["selectors"]) == 2
    (deployment,) = by_kind(objects, "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    assert spec["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": template["metadata"]["name"]}]
    vllm, sidecar = spec["containers"]
    assert vllm["resources"]["claims"] == [{"name": "gpu"}]
    assert "nvidia.com/gpu" not in vllm["resources"]["limits"]
    assert "claims" not in sidecar["resources"]
    assert "--fusion=auto" in spec["initContainers"][0]["args"]


def test_checkpoints_and_graphs_stay_on_the_node(helm4):
    """prepare makes room, vLLM runs with both locked, the sidecar too; nothing that grows lies beside the entries."""
    spec = by_kind(render(helm4, EXAMPLES["node-cache"]), "Deployment")[0]["spec"]["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "model"]
    assert volume["hostPath"]["path"] == "/var/lib/gamma"
    (prepare,), (vllm, sidecar) = spec["initContainers"], spec["containers"]
    (folder,) = [a.partition("=")[2] for a in prepare["args"] if a.startswith("--out=")]
    assert "--cache-limit=300GiB" in prepare["args"]
    assert vllm["command"] == ["gamma", "cache", "run"]
    assert f"--entry={folder}" in vllm["args"]
    rest = vllm["args"][vllm["args"].index("--") + 1 :]
    assert rest[:4] == ["vllm", "serve", "--config", f"{folder}/vllm.yaml"]
    assert {"name": "model", "mountPath": "/model"} in vllm["volumeMounts"]
    assert not [v for v in vllm["env"] if v["value"].startswith("/cache/vllm")]
    assert f"--prepared={folder}" in sidecar["args"]
    assert {"name": "HF_HOME", "value": "/cache/huggingface"} in prepare["env"]


def test_another_image_compiles_anew(helm4):
    def compiled(**image):
        values = yaml.safe_load(EXAMPLES["node-cache"].read_text()) | {"images": {"vllm": image}}
        vllm = by_kind(render(helm4, values), "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]
        return vllm["args"][1]

    assert compiled(tag="1") == compiled(tag="1") != compiled(tag="2")


def test_another_claim_is_another_template(helm4):
    """Kubernetes refuses to change one, and pods that run keep theirs."""

    def name(count):
        profile = {"gpuProfiles": {"l4": {"resource": "", "deviceClass": "gpu.nvidia.com"}}}
        (template,) = by_kind(render(helm4, allocation(count=count) | profile), "ResourceClaimTemplate")
        return template["metadata"]["name"]

    assert name(1) == name(1) != name(2)


def test_an_allocation_at_zero_is_woken_from_outside_and_kept_while_it_answers(helm4):
    (scaled,) = by_kind(render(helm4, EXAMPLES["scale-to-zero"]), "ScaledObject")
    assert scaled["spec"]["minReplicaCount"] == 0
    queue, kept, woken = (trigger["metadata"] for trigger in scaled["spec"]["triggers"])
    assert (queue["query"], queue["threshold"]) == (
        'sum(vllm:num_requests_waiting{namespace="llm",service="demo-gamma-qwen3-8b"})',
        "4",
    )
    assert "num_requests_running" in kept["query"]
    assert woken["query"].startswith("sum(increase(envoy")
    assert all(int(metadata["threshold"]) >= 10**6 for metadata in (kept, woken))  # one replica, not more


def test_only_the_api_is_reached_from_outside(helm4):
    objects = render(helm4, EXAMPLES["from-outside"])
    services = {item["metadata"]["name"]: item for item in by_kind(objects, "Service")}
    hosts = {}
    for ingress in by_kind(objects, "Ingress"):
        (rule,) = ingress["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        assert path["path"] == "/v1"
        target = path["backend"]["service"]
        assert target["port"]["name"] in {port["name"] for port in services[target["name"]]["spec"]["ports"]}
        hosts[rule["host"]] = target["name"]
    assert hosts == {"qwen3-32b.llm.example.com": "demo-gamma-qwen3-32b", "sql.example.com": "demo-gamma-sql"}
    for route in by_kind(objects, "HTTPRoute"):
        (rule,) = route["spec"]["rules"]
        assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
        (target,) = rule["backendRefs"]
        assert target["port"] in {port["port"] for port in services[target["name"]]["spec"]["ports"]}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, {"gamma/budget": "auto", "gamma/gpu": "1xl4"}),
        ({"budget": "3.25bits", "count": 2}, {"gamma/budget": "3.25bits", "gamma/gpu": "2xl4"}),
        ({"budget": "sha256:" + "ab" * 32}, {"gamma/budget": "sha256-abababababab", "gamma/gpu": "1xl4"}),
        ({"gpu": "our cards (new)"}, {"gamma/budget": "auto", "gamma/gpu": "1xour-cards--new"}),
    ],
)
def test_kubectl_get_shows_what_was_asked_for(helm4, changes, shown):
    values = allocation(**changes) | {"gpuProfiles": {"our cards (new)": {"resource": "nvidia.com/gpu"}}}
    (deployment,) = by_kind(render(helm4, values), "Deployment")
    check_object(deployment, "1.34")
    for labels in (deployment["metadata"]["labels"], deployment["spec"]["template"]["metadata"]["labels"]):
        assert {name: labels[name] for name in shown} == shown
        assert all(re.fullmatch(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", value) for value in labels.values())
    assert not set(shown) & set(deployment["spec"]["selector"]["matchLabels"])


def test_the_share_of_the_memory_is_the_planners():
    default = yaml.safe_load((CHART / "values.yaml").read_text())["vllm"]["gpuMemoryUtilization"]
    assert default == PlanRequest().gpu_memory_utilization


def test_a_read_only_root_has_every_writable_path_mounted(helm4):
    """HOME and every cache that the environment names lie on a mounted volume that may be written."""
    for case in ("cluster-virginia", "native-sidecar", "learn", "mig", "multi-node"):
        for item in render(helm4, EXAMPLES[case]):
            containers = [
                c for t in pod_templates(item) for c in t["spec"].get("initContainers", []) + t["spec"]["containers"]
            ]
            for container in containers:
                assert container["securityContext"]["readOnlyRootFilesystem"]
                writable = [m["mountPath"] for m in container.get("volumeMounts", []) if not m.get("readOnly")]
                for variable in container.get("env", []):
                    if variable["name"] in ("HOME", "HF_HOME") or "CACHE" in variable["name"]:
                        assert any(variable["value"].startswith(path) for path in writable), variable


def test_extras(helm4):
    values = allocation() | {
        "extraVolumes": [{"name": "models", "nfs": {"server": "nas", "path": "/models"}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        "extraInitContainers": [{"name": "first", "image": "busybox:1"}],
        "extraContainers": [{"name": "beside", "image": "busybox:1"}],
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "own"}, "data": {"a": "b"}},
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}\n",
        ],
        "podLabels": {"team": "a"},
        "commonLabels": {"owner": "b"},
        "priorityClassName": "high",
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    }
    objects = render(helm4, values)
    for item in objects:
        check_object(item, "1.34")
    assert {"own", "demo-text"} <= {item["metadata"]["name"] for item in by_kind(objects, "ConfigMap")}
    deployment = by_kind(objects, "Deployment")[0]
    assert deployment["metadata"]["labels"]["owner"] == "b"
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "a"
    spec = template["spec"]
    assert [c["name"] for c in spec["initContainers"]] == ["first", "prepare"]
    assert [c["name"] for c in spec["containers"]] == ["vllm", "sidecar", "beside"]
    chart_made = [spec["initContainers"][1], *spec["containers"][:2]]
    assert all("/models" in [m["mountPath"] for m in c["volumeMounts"]] for c in chart_made)
    assert spec["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]["gamma/allocation"] == "one"


def test_an_allocation_has_a_place_and_an_image_of_its_own(helm4):
    spread = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
    own = {
        "priorityClassName": "urgent",
        "topologySpreadConstraints": [spread],
        "image": {"tag": "next"},
        "volumes": [{"name": "adapters", "nfs": {"server": "nas", "path": "/adapters"}}],
        "volumeMounts": [{"name": "adapters", "mountPath": "/adapters", "readOnly": True}],
    }
    one = allocation()["allocations"][0]
    values = allocation() | {
        "allocations": [one, one | {"name": "two"} | own],
        "priorityClassName": "usual",
        "topologySpreadConstraints": [spread | {"topologyKey": "kubernetes.io/hostname"}],
        "images": {"vllm": {"repository": "r/vllm", "digest": "sha256:" + "0" * 64}},
    }
    objects = render(helm4, values)
    for item in objects:
        check_object(item, "1.34")
    first, second = (item["spec"]["template"]["spec"] for item in by_kind(objects, "Deployment"))
    assert (first["priorityClassName"], second["priorityClassName"]) == ("usual", "urgent")
    keys = [spec["topologySpreadConstraints"][0]["topologyKey"] for spec in (first, second)]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    labels = second["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    assert labels["gamma/allocation"] == "two"
    assert first["containers"][0]["image"] == "r/vllm@sha256:" + "0" * 64
    made = [*second["initContainers"], *second["containers"]]
    assert [c["image"] for c in made] == ["r/vllm:next", "r/vllm:next", "gamma-sidecar:0.1.0"]
    assert all("/adapters" in [m["mountPath"] for m in c["volumeMounts"]] for c in made)
    assert "adapters" in [volume["name"] for volume in second["volumes"]]
    assert "adapters" not in [volume["name"] for volume in first["volumes"]]


def test_vllm_is_told_all_adapters_and_where_they_are(helm4):
    """A second --lora-modules would replace the first."""
    deployment = by_kind(render(helm4, EXAMPLES["places-and-adapters"]), "Deployment")[0]
    vllm = deployment["spec"]["template"]["spec"]["containers"][0]
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora-modules", nargs="+")  # as vLLM has it
    told = dict(word.split("=") for word in parser.parse_known_args(vllm["args"])[0].lora_modules)
    assert told == {"support": "/adapters/support", "sales": "/adapters/sales"}
    assert {"name": "adapters", "mountPath": "/adapters", "readOnly": True} in vllm["volumeMounts"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_arguments_are_those_of_the_programs(helm4, name):
    """Every `gamma` command line of the pods is one that the program takes."""
    seen = 0
    for item in render(helm4, EXAMPLES[name]):
        specs = [template["spec"] for template in pod_templates(item)]
        for container in [c for spec in specs for c in [*spec.get("initContainers", []), *spec["containers"]]]:
            words = [*container["command"], *container.get("args", [])]
            if "gamma" not in words:
                continue
            _, verb, *arguments = words[words.index("gamma") :]
            parser = argparse.ArgumentParser(exit_on_error=False)
            import_module(f"allocator.cli.{verb}").add_arguments(parser)
            parser.parse_args(arguments)
            seen += 1
    assert seen or name in ("shared-checkpoints", "ready-checkpoints")
