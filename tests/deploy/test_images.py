"""The image files: their rules, and that their install commands give an environment in which the programs start.

There is no Docker engine here. The pip commands of the files run in a clean virtual environment instead.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.dockerfiles import DEPLOY, DOCKERFILES, ROOT, read
from tests.programs import program

REQUIREMENTS = DEPLOY / "requirements"


def test_all_images_are_here():
    assert set(DOCKERFILES) == {"gamma-vllm", "gamma-vllm-cpu", "gamma-sidecar"}


def test_versions_are_those_of_the_project():
    """The image of vLLM is of a version that the plugin is for; chart and compose name this version's images."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = (r for r in map(Requirement, project["optional-dependencies"]["cuda"]) if r.name == "vllm")
    image = re.search(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v(\S+)$", DOCKERFILES["gamma-vllm"].read_text(), re.MULTILINE)
    assert vllm.specifier.contains(image[1])
    chart = yaml.safe_load((ROOT / "helm" / "gamma" / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    for path in (*DOCKERFILES.values(), *DEPLOY.glob("docker-compose*.yaml")):
        named = set(re.findall(r"(gamma-(?:vllm|vllm-cpu|sidecar)):(\d[\w.]*)", path.read_text()))
        assert named
        assert {version for _, version in named} == {project["version"]}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name):
    done = subprocess.run([program("hadolint"), DOCKERFILES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_rules(name):
    instructions = read(DOCKERFILES[name])
    last = max(i.stage for i in instructions)
    assert last >= 1, "built in one stage, used in another"
    arguments = {i.text.partition("=")[0] for i in instructions if i.word == "ARG" and i.stage == -1}
    for i in instructions:
        if i.word == "FROM":  # the base comes by argument, so that it can be named by digest
            assert re.match(r"\$\{(\w+)\}", i.text)[1] in arguments
        assert i.word != "ADD"
        if i.word == "RUN" and "pip " in i.text and "freeze" not in i.text:
            assert "--no-cache-dir" in i.text
        if i.word == "RUN" and "apt-get install" in i.text:
            assert "--no-install-recommends" in i.text
            assert "rm -rf /var/lib/apt/lists/*" in i.text
        assert not re.search(r"(token|password|secret|api_key)\s*=", i.text, re.IGNORECASE)
    final = [i for i in instructions if i.stage == last]
    words = [i.word for i in final]
    assert [i.text for i in final if i.word == "USER"] == ["10001:10001"]
    assert not [i for i in final[words.index("USER") :] if i.word == "RUN"], "nothing is changed after USER"
    assert {"ENTRYPOINT", "HEALTHCHECK", "EXPOSE"} <= set(words)
    assert all(i.text.startswith("[") for i in final if i.word in ("ENTRYPOINT", "CMD")), "as a list: signals arrive"


def test_copied_files_are_in_the_build_context():
    """Every COPY finds its files, and .dockerignore lets them through."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in DOCKERFILES.values():
        for i in read(path):
            sources = i.text.split()[:-1] if i.word == "COPY" and "--from" not in i.text else []
            sources += re.findall(r"type=bind,source=([^,]+)", i.text)
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source.partition("/")[0] in allowed, source


def locked(name: str) -> dict[str, Requirement]:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


def test_the_sidecar_has_the_versions_that_are_tested_here():
    cpu, sidecar = locked("cpu.lock"), locked("sidecar.lock")
    assert {name: str(r.specifier) for name, r in sidecar.items() if name in cpu} == {
        name: str(cpu[name].specifier) for name in sidecar if name in cpu
    }
    assert set(sidecar) - set(cpu) == {"nvidia-ml-py"}
    assert not {"torch", "vllm-cpu", "transformers"} & set(sidecar)
    assert not set(locked("object-storage.lock")) & set(cpu)


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory):
    """A virtual environment made by the RUN lines of the sidecar's image, beside a copy of the build context."""
    folder = tmp_path_factory.mktemp("image")
    source, target = folder / "src", folder / "opt"
    source.mkdir()
    copied = []
    for i in read(DOCKERFILES["gamma-sidecar"]):
        if i.stage != 0:
            continue
        if i.word == "COPY":
            *names, place = i.text.split()
            for name in names:
                copied.append(name)
                to = source / place / Path(name).name if place.endswith("/") else source / place
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, to)
        elif i.word == "RUN":
            command = i.text.replace("/opt/gamma", str(target))
            keep = {n: v for n, v in os.environ.items() if not n.startswith("PYTHON")}
            python = Path(sys.executable).resolve().parent
            path = {
                "PATH": f"{target}/bin:{python}:{os.environ['PATH']}",
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "PIP_NO_COMPILE": "1",
            }
            done = subprocess.run(["bash", "-ec", command], cwd=source, env=keep | path, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert "allocator" in copied
    shutil.rmtree(source)  # the image's last stage has the environment alone
    return target


@pytest.mark.slow
def test_the_sidecar_image_works(clean_environment, tmp_path):
    """Packages agree, nothing heavy came along, object storage loads, and the entry point serves."""
    python = clean_environment / "bin" / "python"

    def run(*command, **options):
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin"}, **options
        )

    disagreements = run(python, "-m", "pip", "check").stdout.splitlines()
    known = ("gcsfs", "aiobotocore", "botocore")  # see the head of object-storage.lock
    assert [line for line in disagreements if not line.startswith((*known, "No broken"))] == []
    code = "import s3fs, gcsfs, importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('vllm')"
    loaded = run(python, "-c", code)
    assert loaded.returncode == 0, loaded.stderr

    entry = json.loads(next(i.text for i in read(DOCKERFILES["gamma-sidecar"]) if i.word == "ENTRYPOINT"))
    gamma = clean_environment / "bin" / entry[0]
    version = run(gamma, "--version")
    assert version.returncode == 0, version.stderr
    assert run(gamma, "sidecar", "--help").returncode == 0
    store = tmp_path / "store"
    store.mkdir()
    answers = """
import json, re, subprocess, sys, urllib.request
command = [sys.argv[1], "sidecar", "--store", sys.argv[2], "--port", "0"]
process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
try:
    for line in process.stderr:
        if '"listening"' in line:
            port = json.loads(line)["port"]
            break
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/gpus", "/"):
        print(path, urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").status)
finally:
    process.terminate()
    process.wait()
"""
    served = run(python, "-c", answers, gamma, store, timeout=60)
    assert served.stdout.count(" 200") == 6, served.stdout + served.stderr
    # The image's health check is the same program.
    health = next(i.text for i in read(DOCKERFILES["gamma-sidecar"]) if i.word == "HEALTHCHECK")
    assert "/healthz" in health


@pytest.mark.slow
def test_what_the_cpu_image_adds_loads_beside_vllm(clean_environment):
    """The CPU image is cpu.lock, which is this environment, and object-storage.lock: the two together import."""
    site = next((clean_environment / "lib").glob("python3.*/site-packages"))
    code = "import sys, torch, vllm, transformers; sys.path.append(sys.argv[1]); import s3fs, gcsfs"
    done = subprocess.run([sys.executable, "-c", code, site], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("gamma", "vllm"):
        assert (Path(sys.executable).parent / name).exists()
