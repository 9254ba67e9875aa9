"""Runs the containers of a rendered pod as processes on this machine, in the order that a kubelet would.

Volumes are folders: the paths at which they are mounted are replaced in commands, arguments and environment. Images are
this environment (`.venv`), whose programs the images install. Resources and security contexts are not applied.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.helm.charts import Object
from tests.waiting import wait_for

__all__ = ["Pod", "fetch"]

ROOT = Path(__file__).parents[2]


def fetch(url: str, timeout_seconds: float = 10, data: bytes | None = None) -> tuple[int, str]:
    """Status (0: nobody answers) and body."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


class Pod:
    """`with Pod(template, volumes, logs) as pod: pod.start()`. `volumes`: name of a volume -> folder."""

    def __init__(self, template: Object, volumes: dict[str, Path], logs: Path) -> None:
        self.spec = template["spec"]
        self.volumes, self.logs = volumes, logs
        self.running: dict[str, subprocess.Popen] = {}
        logs.mkdir(parents=True, exist_ok=True)
        # Volumes that die with the pod. A short path: vLLM's sockets are in its /tmp, and their names are limited.
        self.empty = Path(tempfile.mkdtemp(prefix="pod-"))
        for volume in self.spec["volumes"]:
            name = volume["name"]
            if "hostPath" in volume:
                volumes.setdefault(name, Path(volume["hostPath"]["path"]))
            volumes.setdefault(name, self.empty / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.empty, ignore_errors=True)

    def start(self) -> None:
        """Init containers one after the other, native sidecars until their startup probe answers, then the others."""
        for container in self.spec.get("initContainers", []):
            if container.get("restartPolicy") == "Always":
                self.begin(container)
                self.wait(container, "startupProbe")
            else:
                self.begin(container).wait()
                process = self.running.pop(container["name"])
                assert process.returncode == 0, self.log(container["name"])
        for container in self.spec["containers"]:
            self.begin(container)
        for container in self.spec["containers"]:
            self.wait(container, "startupProbe")
            self.wait(container, "readinessProbe")

    def complete(self) -> None:
        """All containers one after the other, to their end: a Job."""
        for container in [*self.spec.get("initContainers", []), *self.spec["containers"]]:
            self.begin(container).wait()
            process = self.running.pop(container["name"])
            assert process.returncode == 0, self.log(container["name"])

    def wait(self, container: Object, kind: str) -> None:
        """Ask a probe for as long as it says (readiness: ten minutes); fails when it gives up or the container ends."""
        probe = container.get(kind)
        if probe is None:
            return
        allowed_seconds = probe["periodSeconds"] * probe["failureThreshold"] if kind == "startupProbe" else 600

        def answers() -> bool:
            process = self.running[container["name"]]
            assert process.poll() is None, f"ended with {process.returncode}:\n{self.log(container['name'])}"
            return self.probe(container, kind)

        told = lambda: f"{kind} of {container['name']} gave up:\n{self.log(container['name'])}"  # noqa: E731
        wait_for(answers, told, allowed_seconds)

    def probe(self, container: Object, kind: str) -> bool:
        target = container[kind]["httpGet"]
        return 200 <= fetch(self.url(container, target["port"]) + target["path"])[0] < 400

    def url(self, container: Object, port: str) -> str:
        (number,) = (p["containerPort"] for p in container["ports"] if p["name"] == port)
        return f"http://127.0.0.1:{number}"

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()[-4000:]

    def begin(self, container: Object) -> subprocess.Popen:
        places = {
            mount["mountPath"]: str(self.volumes[mount["name"]])
            for mount in container["volumeMounts"]
            if mount["mountPath"] != "/dev/shm"
        }
        pattern = re.compile(
            r"(?<![A-Za-z0-9_.-])(" + "|".join(sorted(map(re.escape, places), key=len, reverse=True)) + r")(?=/|$)"
        )

        def here(text: str) -> str:
            return pattern.sub(lambda match: places[match[1]], text)

        environment = {
            # What the images set.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": places["/tmp"],
        }
        environment |= {variable["name"]: here(variable["value"]) for variable in container.get("env", [])}
        command = [here(part) for part in [*container["command"], *container["args"]]]
        with (self.logs / f"{container['name']}.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=self.logs)
        self.running[container["name"]] = process
        return process
