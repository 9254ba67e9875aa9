"""The router that the chart puts before the pods is vLLM's own, started here as the chart would start it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from tests.helm.charts import EXAMPLES, Object, allocation, by_kind, render
from tests.helm.kubernetes_api import KubernetesApi
from tests.programs import VLLM_ROUTER
from tests.skips import lacking
from tests.waiting import wait_for

PODS = {"one-a": "127.0.0.2", "one-b": "127.0.0.3"}


class _Vllm(BaseHTTPRequestHandler):
    """Answers every completion with the address that it was asked at."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"at": self.connection.getsockname()[0], "key": self.headers["Authorization"]})

    def _answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def pods(port: int) -> Iterator[None]:
    ThreadingHTTPServer.daemon_threads = True
    servers = [ThreadingHTTPServer((address, port), _Vllm) for address in PODS.values()]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def pod(name: str, labels: dict[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "llm", "uid": name, "resourceVersion": "1", "labels": labels},
        "spec": {"containers": [{"name": "vllm", "image": "a"}]},
        "status": {"phase": "Running", "podIP": PODS[name], "conditions": [{"type": "Ready", "status": "True"}]},
    }


@contextlib.contextmanager
def router(helm, folder: Path, policy: str) -> Iterator[httpx.Client]:
    """The rendered command, with a Kubernetes API that lists two pods of the allocation and one of another."""
    if not VLLM_ROUTER.is_dir():
        pytest.skip(lacking("package", "vllm-router is not here"))
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.2", 0))
        other.bind(("127.0.0.1", 0))
        port, metrics = probe.getsockname()[1], other.getsockname()[1]
    values = allocation() | {
        "vllm": {"port": port},
        "router": {"enabled": True, "policy": policy, "metricsPort": metrics},
    }
    objects = render(helm, values)
    (deployment,) = by_kind(objects, "Deployment", "router")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["vllm-router"]
    arguments = [a.replace("0.0.0.0", "127.0.0.1") for a in container["args"]]  # pods have addresses of their own
    (serving,) = by_kind(objects, "Deployment", "serving")
    labels = serving["spec"]["template"]["metadata"]["labels"]
    with KubernetesApi() as api, pods(port):
        for name, foreign in (("one-a", {}), ("one-b", {})):
            api.objects["v1", "pods", "llm", name] = pod(name, labels | foreign)
        strange = pod("one-a", labels | {"gamma/allocation": "two"})
        strange["metadata"]["name"], strange["status"]["podIP"] = "two-a", "127.0.0.4"  # where nobody answers
        api.objects["v1", "pods", "llm", "two-a"] = strange
        context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [context]}
        config |= {"clusters": [{"name": "c", "cluster": {"server": api.url}}]}
        (folder / "kubeconfig").write_text(yaml.safe_dump(config | {"users": [{"name": "u", "user": {"token": "t"}}]}))
        environment = os.environ | {"KUBECONFIG": str(folder / "kubeconfig"), "PYTHONPATH": str(VLLM_ROUTER)}
        command = [sys.executable, "-m", "vllm_router.launch_router", *arguments]
        log = folder / "log"
        with (
            log.open("wb") as output,
            subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
        ):
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

                    def knows_both() -> bool:
                        assert process.poll() is None, log.read_text()
                        with contextlib.suppress(httpx.TransportError):
                            answer = http.get(container["readinessProbe"]["httpGet"]["path"])
                            text = httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
                            return answer.status_code == 200 and all(
                                f"http://{ip}:{port}" in text for ip in PODS.values()
                            )
                        return False

                    wait_for(knows_both, log.read_text)
                    assert http.get(container["livenessProbe"]["httpGet"]["path"]).status_code == 200
                    yield http
            finally:
                process.kill()


def ask(http: httpx.Client, prompt: str, **headers: str) -> dict:
    body = {"model": "m", "prompt": prompt, "max_tokens": 1}
    answer = http.post("/v1/completions", json=body, headers={"Authorization": "Bearer key"} | headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_session_stays_on_its_pod(helm4, tmp_path):
    with router(helm4, tmp_path, "consistent_hash") as http:
        places = defaultdict(set)
        for turn in range(3):
            for session in range(16):
                answer = ask(http, f"turn {turn}", **{"X-Session-ID": f"session-{session}"})
                places[session].add(answer["at"])
                assert answer["key"] == "Bearer key"  # vLLM asks for it
    assert all(len(used) == 1 for used in places.values())
    assert set.union(*places.values()) == set(PODS.values())


def test_prompts_go_where_their_beginning_is(helm4, tmp_path):
    with router(helm4, tmp_path, "cache_aware") as http:
        beginnings = [f"{number} {word} " * 60 for number, word in enumerate(("contract", "poem", "recipe", "ticket"))]
        places = [{ask(http, f"{beginning} question {n}")["at"] for n in range(4)} for beginning in beginnings]
    assert all(len(used) == 1 for used in places)


def test_everything_from_outside_goes_by_the_router(helm4):
    outside = {
        "router": {"enabled": True},
        "ingress": {"enabled": True, "domain": "a.b"},
        "httpRoute": {"enabled": True, "domain": "a.b", "parentRefs": [{"name": "g"}]},
        "networkPolicy": {"clients": [{"namespaceSelector": {}}]},
    }
    objects = render(helm4, allocation() | outside)
    services = {
        s["metadata"]["name"]: {p["name"]: p["port"] for p in s["spec"]["ports"]} for s in by_kind(objects, "Service")
    }
    front = "demo-gamma-one-router"
    (ingress,) = by_kind(objects, "Ingress")
    service = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert service["name"] == front
    assert service["port"]["name"] in services[front]
    (route,) = by_kind(objects, "HTTPRoute")
    assert route["spec"]["rules"][0]["backendRefs"] == [{"name": front, "port": services[front]["api"]}]
    (test,) = by_kind(objects, "Pod", "test")
    assert any(f"//{front}.llm:" in word for word in test["spec"]["containers"][0]["args"])
    # Prometheus must not take it for a vLLM.
    assert "http" not in services[front]


def test_the_router_may_list_pods_and_nothing_else(helm4):
    objects = render(helm4, EXAMPLES["router"])
    for role in by_kind(objects, "Role"):
        assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    for deployment in by_kind(objects, "Deployment", "router"):
        spec = deployment["spec"]["template"]["spec"]
        (binding,) = [b for b in by_kind(objects, "RoleBinding") if b["metadata"]["name"] == spec["serviceAccountName"]]
        assert binding["roleRef"]["name"] == binding["subjects"][0]["name"] == spec["serviceAccountName"]
        (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "kubernetes"]
        assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    policies = [
        d["spec"]["template"]["spec"]["containers"][0]["args"][2] for d in by_kind(objects, "Deployment", "router")
    ]
    assert policies == ["--policy=cache_aware", "--policy=consistent_hash"]
