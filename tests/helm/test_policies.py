"""checkov's policies for Kubernetes: nothing is open but what is listed here, with the reason."""

import json
import subprocess

import pytest
import yaml

from tests.helm.charts import EXAMPLES, pod_templates, render
from tests.programs import program

OPEN = {
    "CKV_K8S_11": "No CPU limit for vLLM: throttling a thread that feeds the GPU costs more than it protects.",
    "CKV_K8S_35": "vLLM takes its API key from the environment or the command line only.",
    "CKV_K8S_8": "The pod of `helm test` runs once and ends; there is nothing to probe.",
    "CKV_K8S_9": "The pod of `helm test` runs once and ends; there is nothing to probe.",
}
ONLY_FOR_TEST_POD = {"CKV_K8S_8", "CKV_K8S_9"}
DIGEST = "sha256:" + "0" * 64
IMAGES = {"images": {name: {"repository": f"r/{name}", "digest": DIGEST} for name in ("vllm", "sidecar")}}
IMAGES |= {"router": {"image": {"repository": "r/router", "digest": DIGEST}}}


@pytest.mark.slow
def test_policies(helm4, tmp_path):
    for name, path in EXAMPLES.items():
        if name == "cpu":  # for trying things out: it switches the network policy off and mounts the host's folder
            continue
        objects = render(helm4, path, IMAGES)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    command = [program("checkov"), "--framework", "kubernetes", "--directory", tmp_path, "--compact", "--quiet"]
    done = subprocess.run([*command, "--output", "json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 500
    found = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert {check for check, _ in found} == set(OPEN)  # one that closes leaves the list
    assert all(resource.startswith("Pod.") for check, resource in found if check in ONLY_FOR_TEST_POD)


def test_images_can_be_named_by_digest(helm4):
    for item in render(helm4, EXAMPLES["cluster-virginia"], IMAGES):
        if item["kind"] == "Deployment":
            assert all(c["image"].endswith(f"@{DIGEST}") for c in item["spec"]["template"]["spec"]["containers"])


# Pod Security Standards, level restricted: https://kubernetes.io/docs/concepts/security/pod-security-standards/
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


# Whether image volumes (ready-checkpoints) are of it depends on the version of Kubernetes. A node's folder is not.
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("cpu", "node-cache", "ready-checkpoints")])
def test_pods_are_of_the_restricted_level(helm4, name):
    for item in render(helm4, EXAMPLES[name]):
        for template in pod_templates(item):
            check_restricted(template["spec"])


def check_restricted(spec):
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] >= 10_000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec["automountServiceAccountToken"] is False
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= VOLUMES
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert not [port for port in container.get("ports", []) if "hostPort" in port]
