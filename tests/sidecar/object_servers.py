"""Real HTTP servers of object storage for the tests: moto for S3, gcp-storage-emulator for Google Cloud Storage."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx

from tests.programs import OBJECT_STORAGE
from tests.waiting import wait_for

BUCKET = "models"
PATH = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(OBJECT_STORAGE))))
sys.path.append(str(OBJECT_STORAGE))  # of tests; processes get PATH
NEEDED = {"s3": ("s3fs", "moto", "flask_cors"), "gs": ("gcsfs", "gcp_storage_emulator")}


@dataclass(frozen=True)
class Bucket:
    """`url` is a store in it; clients find the server by `environment`."""

    url: str
    environment: dict[str, str]


def missing(scheme: str) -> str | None:
    """Why `scheme` cannot be served here, for a skip."""
    absent = [name for name in NEEDED[scheme] if find_spec(name) is None]
    return f"{', '.join(absent)} is not here" if absent else None


@contextlib.contextmanager
def bucket(scheme: str, log: Path) -> Iterator[Bucket]:
    """A server with an empty bucket, ended afterwards."""
    port, here = _free_port(), Path(__file__).parent
    url, environment = f"http://127.0.0.1:{port}", {"PYTHONPATH": PATH}
    if scheme == "s3":
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        environment |= {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
    else:
        command = [sys.executable, str(here / "gs_server.py"), str(port), BUCKET]
        environment |= {"STORAGE_EMULATOR_HOST": url}
    everything = os.environ | environment
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=everything) as process:
        try:
            _wait(url, process, log)
            if scheme == "s3":
                assert httpx.put(f"{url}/{BUCKET}").status_code == 200
            yield Bucket(f"{scheme}://{BUCKET}/gamma", environment)
        finally:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url, timeout=5)
            return True
        return False

    wait_for(answers, log.read_text)
