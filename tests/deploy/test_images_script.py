"""deploy/images.py: which engine it takes, what it calls its images, and that it pushes nothing that fails.

Engines are stood in for by a program that writes down what it is asked and answers as an image would: base images come
from registries, which tests do not ask. The script itself tries what it builds.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.dockerfiles import DEPLOY, ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
ENGINE = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0") $*" in
    "docker version"*) exit "${DOCKER_DAEMON:-0}" ;;
    *" from "*) echo working-container ;;
    *"gamma --version"* | *"gamma "*"--version") echo "gamma ${TOLD:-VERSION}" ;;
    *" -u") echo 10001 ;;
    *cyclonedx*) echo '{"bomFormat": "CycloneDX", "components": []}' ;;
esac
""".replace("VERSION", VERSION)


def images(folder: Path, *arguments: object, engines=("docker", "podman", "buildah"), **environment: str):
    """The script with these engines on its PATH: result, and their calls."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in engines:
        (programs / name).write_text(ENGINE)
        (programs / name).chmod(0o755)
    for name in ("sh", "basename"):
        if not (programs / name).exists():
            (programs / name).symlink_to(shutil.which(name))
    calls = folder / "calls"
    calls.write_text("")
    command = [sys.executable, DEPLOY / "images.py", *map(str, arguments)]
    env = {"PATH": str(programs), "CALLS": str(calls)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    return done, calls.read_text().splitlines()


def test_tags_are_by_version_and_pushed_after_all_were_tried(tmp_path):
    done, calls = images(
        tmp_path, "--registry", "r.example.com/llm/", "--push", "--build-arg", "PYTHON_IMAGE=p@sha256:0"
    )
    assert done.returncode == 0, done.stderr
    tags = [f"r.example.com/llm/{name}:{VERSION}" for name in ("gamma-sidecar", "gamma-vllm-cpu", "gamma-vllm")]
    built = [call for call in calls if call.startswith("docker build")]
    assert len(built) == 3
    assert all(f"-t {tag}" in call for tag, call in zip(tags, built, strict=True))
    assert all("--build-arg PYTHON_IMAGE=p@sha256:0" in call for call in built)
    assert calls[-3:] == [f"docker push {tag}" for tag in tags]


@pytest.mark.parametrize(
    ("engines", "daemon", "taken"),
    [
        (("docker", "podman"), "0", "docker"),
        (("docker", "podman"), "1", "podman"),
        (("docker", "buildah"), "1", "buildah"),
        (("docker",), "1", None),
        ((), "0", None),
    ],
)
def test_the_engine_is_the_first_that_works(tmp_path, engines, daemon, taken):
    done, calls = images(tmp_path, "gamma-sidecar", engines=engines, DOCKER_DAEMON=daemon)
    assert done.returncode == (2 if taken is None else 0), done.stderr
    assert {call.split()[0] for call in calls if " build " in call} == ({taken} if taken else set())
    if taken is None:
        assert "no engine works here" in done.stderr


def test_an_image_of_another_version_is_not_pushed(tmp_path):
    done, calls = images(tmp_path, "gamma-sidecar", "--registry", "r", "--push", TOLD="0.0.1")
    assert done.returncode == 1
    assert f"says that it is 'gamma 0.0.1', the project is {VERSION}" in done.stderr
    assert not [call for call in calls if " push " in call]


def test_a_bill_of_materials_is_written_for_each_image(tmp_path):
    done, _ = images(tmp_path, "gamma-sidecar", "--sbom", tmp_path / "sbom", engines=("buildah",))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "sbom" / f"gamma-sidecar-{VERSION}.cdx.json").read_text())["bomFormat"] == "CycloneDX"


def test_wrong_arguments_are_refused(tmp_path):
    assert "no image gamma-x; there are" in images(tmp_path, "gamma-x")[0].stderr
    assert "--push needs --registry" in images(tmp_path, "--push")[0].stderr
