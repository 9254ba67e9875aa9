"""Builds the images with whatever engine is here, tries them, and writes what is in them.

    python3 deploy/images.py                                  gamma-sidecar, gamma-vllm-cpu and gamma-vllm
    python3 deploy/images.py gamma-sidecar --sbom sbom        one image, and sbom/gamma-sidecar-VERSION.cdx.json
    python3 deploy/images.py --registry registry.example.com/llm --push

The engine is docker if its daemon answers, else podman, else buildah (which needs neither daemon nor root). Tags are
the project's version. Each image is tried before it is pushed: as its own user, it must tell its version, load what it
is for, and the sidecar must answer. Exit status: 0 done, 1 an image failed, 2 no engine or a wrong argument.

The bill of materials (CycloneDX) has the Python packages, by cyclonedx-py inside the image; packages of the
distribution are those of the base image. --build-arg names base images; --engine-arg and --run-arg are for
what a site needs besides (indexes, certificates).
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CYCLONEDX = "cyclonedx-bom==7.5.0"
PLUGIN = """
import gamma_vllm
from vllm.model_executor.layers.quantization import get_quantization_config
gamma_vllm.register()
get_quantization_config("gamma")
"""
ANSWERS = """
import json, subprocess, sys, tempfile, urllib.request
command = ["gamma", "sidecar", "--store", tempfile.mkdtemp(), "--port", "0"]
process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
port = next(json.loads(line)["port"] for line in process.stderr if '"listening"' in line)
for path in ("/healthz", "/metrics", "/"):
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20).status == 200, path
process.terminate()
"""
# What each image must be able to do.
TRIALS = {
    "gamma-sidecar": [ANSWERS, "import s3fs, gcsfs"],
    "gamma-vllm-cpu": [PLUGIN, ANSWERS, "import s3fs, gcsfs, httpx, huggingface_hub"],
    "gamma-vllm": [PLUGIN, ANSWERS, "import s3fs, gcsfs, httpx, huggingface_hub"],
}


class Engine:
    """docker, podman or buildah; `chroot`: buildah without namespaces of its own, as inside a container."""

    def __init__(self, name: str, chroot: bool = False) -> None:
        self.name = name
        self.isolation = ["--isolation", "chroot"] if name == "buildah" and chroot else []

    def build(self, file: Path, tag: str, arguments: Sequence[str]) -> None:
        # The OCI format has no health check, which the Dockerfiles set.
        form = [] if self.name == "docker" else ["--format", "docker"]
        _call(self.name, "build", *form, *self.isolation, *arguments, "-f", str(file), "-t", tag, str(ROOT))

    def run(self, tag: str, *command: str, user: str | None = None, more: Sequence[str] = ()) -> str:
        """What the command prints, run in a container of the image that is gone afterwards."""
        if self.name != "buildah":
            options = ["--rm", *(["--user", user] if user else []), *more, "--entrypoint", command[0]]
            return _call(self.name, "run", *options, tag, *command[1:], capture=True)
        container = _call("buildah", "from", tag, capture=True).split()[-1]
        try:
            options = [*self.isolation, *(["--user", user] if user else []), *more]
            return _call("buildah", "run", *options, container, "--", *command, capture=True)
        finally:
            _call("buildah", "rm", container, capture=True)

    def push(self, tag: str) -> None:
        _call(self.name, "push", tag)


class FailedError(Exception):
    """A command of the engine that failed, with its last words."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(TRIALS)} (default: all)")
    parser.add_argument("--engine", choices=["docker", "podman", "buildah"], help="default: the first that works")
    parser.add_argument(
        "--chroot", action="store_true", help="buildah inside a container: without namespaces of its own"
    )
    parser.add_argument("--registry", metavar="HOST/PATH", help="before the images' names")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="e.g. PYTHON_IMAGE=...@sha256:..."
    )
    parser.add_argument("--engine-arg", action="append", default=[], metavar="ARG", help="more for the engine's build")
    parser.add_argument(
        "--run-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="more for its run, where --sbom installs cyclonedx",
    )
    parser.add_argument("--sbom", type=Path, metavar="DIR", help="write IMAGE-VERSION.cdx.json there")
    parser.add_argument("--push", action="store_true", help="to --registry, after all images were tried")
    args = parser.parse_args(arguments)
    wrong = [name for name in args.images if name not in TRIALS]
    if wrong or (args.push and not args.registry):
        parser.error(f"no image {wrong[0]}; there are {', '.join(TRIALS)}" if wrong else "--push needs --registry")
    name = args.engine or _found()
    if name is None:
        print("images: no engine works here: neither a docker daemon, nor podman, nor buildah", file=sys.stderr)
        return 2
    engine, version = Engine(name, args.chroot), _version()
    given = [part for value in args.build_arg for part in ("--build-arg", value)] + args.engine_arg
    tags = []
    try:
        for image in args.images or TRIALS:
            tag = f"{args.registry.rstrip('/')}/{image}:{version}" if args.registry else f"{image}:{version}"
            print(f"images: {tag} with {name}", flush=True)
            label = ["--label", f"org.opencontainers.image.version={version}"]
            engine.build(ROOT / "deploy" / f"{image}.Dockerfile", tag, [*label, *given])
            _try(engine, image, tag, version)
            if args.sbom is not None:
                _write_sbom(engine, tag, args.sbom / f"{image}-{version}.cdx.json", args.run_arg)
            tags.append(tag)
        for tag in tags if args.push else []:
            engine.push(tag)
    except FailedError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    print(f"images: {'pushed' if args.push else 'built and tried'}: {', '.join(tags)}")
    return 0


def _try(engine: Engine, image: str, tag: str, version: str) -> None:
    told = engine.run(tag, "gamma", "--version").strip()
    if told != f"gamma {version}":
        raise FailedError(f"{tag} says that it is {told!r}, the project is {version}")
    user = engine.run(tag, "id", "-u").strip()
    if user != "10001":
        raise FailedError(f"{tag} runs as user {user}, not 10001")
    for code in TRIALS[image]:
        engine.run(tag, "python3", "-c", code)


def _write_sbom(engine: Engine, tag: str, path: Path, more: Sequence[str]) -> None:
    """cyclonedx-py looks at the image's environment from one of its own, in a container that is thrown away."""
    script = f"""set -e
python3 -m venv /tmp/sbom
/tmp/sbom/bin/python -m pip install -q --disable-pip-version-check {CYCLONEDX} >&2
/tmp/sbom/bin/cyclonedx-py environment --output-reproducible --sv 1.6 "$(command -v python3)"
"""
    text = engine.run(tag, "sh", "-c", script, user="0", more=more)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text[text.index("{") :], encoding="utf-8")
    print(f"images: {path}")


def _found() -> str | None:
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) is None:
            continue
        asked = ["version", "--format", "{{.Server.Version}}"] if name == "docker" else ["--version"]
        if subprocess.run([name, *asked], capture_output=True, check=False).returncode == 0:
            return name
    return None


def _version() -> str:
    found = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def _call(*command: str, capture: bool = False) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode:
        words = (done.stderr or "").strip().splitlines()[-3:]
        raise FailedError(f"`{' '.join(command)[:200]}` ended with {done.returncode}: {' '.join(words)}")
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
