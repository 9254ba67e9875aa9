"""Runs helm on the chart, and reads what comes out."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.programs import program

__all__ = [
    "CHART",
    "CLOUDS",
    "EXAMPLES",
    "KUBERNETES",
    "OLDEST",
    "Helm",
    "allocation",
    "by_kind",
    "fail",
    "pod_templates",
    "render",
]

CHART = Path(__file__).parents[2] / "helm" / "gamma"
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}
CLOUDS = {path.stem: path for path in sorted((CHART / "clouds").glob("*.yaml"))}
KUBERNETES = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34")
# Examples that need a newer one.
OLDEST = {"ready-checkpoints": "1.31", "device-claims": "1.34"}

Object = dict[str, Any]


class Helm:
    """One helm program. `options` are given to each call, e.g. the address of a cluster."""

    def __init__(self, name: str, options: tuple[str, ...] = ()) -> None:
        self.name, self.options, self.path = name, options, program(name)

    def run(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [self.path, *map(str, arguments), *self.options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done


def render(helm: Helm, *values: Path | dict, kube: str = "1.34", options: tuple[str, ...] = ()) -> list[Object]:
    """The objects that `helm template` makes of value files and, given on stdin, of one dict."""
    files = [item for item in values if isinstance(item, Path)]
    inline = [item for item in values if isinstance(item, dict)]
    command = [helm.path, "template", "demo", CHART, "--namespace", "llm", "--kube-version", kube, *options]
    for path in files:
        command += ["-f", path]
    if inline:
        command += ["-f", "-"]
    text = yaml.safe_dump(inline[0]) if inline else None
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def fail(helm: Helm, *values: Path | dict) -> str:
    """Why helm refuses the values."""
    try:
        objects = render(helm, *values)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{helm.name} took the values and made {len(objects)} objects")


def by_kind(objects: list[Object], kind: str, component: str | None = None) -> list[Object]:
    chosen = [item for item in objects if item["kind"] == kind]
    if component is not None:
        chosen = [o for o in chosen if o["metadata"]["labels"].get("app.kubernetes.io/component") == component]
    return chosen


def pod_templates(item: Object) -> list[Object]:
    """The templates of an object's pods; a pod is its own."""
    if item["kind"] == "Pod":
        return [item]
    if item["kind"] == "LeaderWorkerSet":
        group = item["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return [item["spec"]["template"]] if item["kind"] in ("Deployment", "Job") else []


def allocation(**changes: Any) -> dict[str, Any]:
    """Values with one allocation, which `changes` changes."""
    one = {"name": "one", "model": "Qwen3-8B", "gpu": "l4", "maxModelLen": 4096, "maxNumSeqs": 8} | changes
    return {"store": {"url": "s3://models/gamma"}, "allocations": [one]}
