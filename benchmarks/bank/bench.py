"""From a new budget to a ready server: straight from the bank, against exporting a checkpoint and serving that.

    make bench-bank

A model of the shape of Qwen3-0.6B with random weights, a bank of random candidates at 3 and 4 bits (time does not
depend on values), a manifest that takes one half of the modules at each. The two ways take turns. Writes
benchmarks/results/bank.json; needs 3 GB of disk under demo-out.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.blocks.tensors import write_safetensors  # noqa: E402
from allocator.contract.bank import BANK_NAME, Bank, BankModule, ModelReference, candidate_tensors  # noqa: E402
from allocator.contract.digest import digest_file  # noqa: E402
from allocator.contract.layout import ModuleFormat, module_bytes  # noqa: E402
from allocator.contract.manifest import Budget, Manifest  # noqa: E402
from allocator.export import CheckpointSource, ExportSettings, export_checkpoint  # noqa: E402
from allocator.model import Inventory, model_digest, read_inventory  # noqa: E402
from allocator.quantize import BankReader, make_servable  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402
from benchmarks.serving.checkpoints import write_model  # noqa: E402

OUT = ROOT / "demo-out" / "bank"
_START_SECONDS = 600
SEED, REPEATS, WIDTHS = 0, 2, (3, 4)


def candidate(shape: tuple[int, int], num_bits: int) -> ModuleFormat:
    return ModuleFormat.model_validate({"shape": shape, "num_bits": num_bits, "group_size": 128, "symmetric": False})


def write_bank(inventory: Inventory, reference: ModelReference, folder: Path) -> Bank:
    """Random candidates of every linear module."""
    folder.mkdir(parents=True)
    modules = {}
    for module in inventory.modules:
        if module.role != "linear":
            continue
        formats = [candidate(module.shape, bits) for bits in WIDTHS]
        tensors = {}
        for form in formats:
            for spec in candidate_tensors(form, "BF16"):
                if spec.dtype == "I32":
                    tensors[spec.name] = torch.randint(-(1 << 31), 1 << 31, spec.shape).to(torch.int32)
                else:
                    random = torch.rand(spec.shape).mul_(0.005).to(torch.bfloat16)
                    tensors[spec.name] = torch.tensor(form.shape) if spec.dtype == "I64" else random
        path = folder / f"{module.name}.safetensors"
        write_safetensors(tensors, path)
        modules[module.name] = BankModule(file=path.name, file_digest=digest_file(path), candidates=formats)
    bank = Bank(model=reference, dtype="BF16", quantizer="random", group_size=128, symmetric=False, modules=modules)
    bank.write(folder / BANK_NAME)
    make_servable(inventory, folder)
    return bank


def alternate(inventory: Inventory, bank: Bank) -> Manifest:
    """Every other module at each of the widths, embeddings at 16 bits."""
    modules = {
        m.name: candidate(m.shape, WIDTHS[i % len(WIDTHS)])
        if m.name in bank.modules
        else ModuleFormat(shape=m.shape, num_bits=16)
        for i, m in enumerate(inventory.modules)
    }
    sizes = {name: module_bytes(module) for name, module in modules.items()}
    total = inventory.other_bytes + sum(sizes.values())
    return Manifest(
        model=bank.model,
        bank_digest=bank.digest,
        method="alternate",
        dtype="BF16",
        budget=Budget(requested="3.5 bits", nbytes=total),
        tensor_bytes=total,
        other_bytes=inventory.other_bytes,
        module_bytes=sizes,
        modules=modules,
    )


def seconds_to_ready(model: Path, log: Path, *flags: str, **environment: str) -> tuple[float, float]:
    """Wall and CPU seconds from starting `vllm serve` to its first healthy answer; the server is stopped again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port), *flags]
    command += ["--host", "127.0.0.1", "--max-model-len", "512", "--max-num-seqs", "1", "--enforce-eager"]
    variables = (
        os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environment
    )
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | variables | environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            while process.poll() is None and time.perf_counter() - start < _START_SECONDS:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    return time.perf_counter() - start, _cpu_seconds(process.pid)
                time.sleep(0.1)
            raise SystemExit(f"the server ended with {process.returncode}, or did not start in time; see {log}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _cpu_seconds(pid: int) -> float:
    """Of a process and all below it."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(t.user + t.system + t.children_user + t.children_system for t in (p.cpu_times() for p in tree))


def main() -> None:
    torch.manual_seed(SEED)
    shutil.rmtree(OUT, ignore_errors=True)
    model = write_model("Qwen3-0.6B", OUT / "Qwen3-0.6B", SEED)
    inventory = read_inventory(model)
    reference = ModelReference(name=model.name, architecture=inventory.architecture, digest=model_digest(inventory))
    manifest = alternate(inventory, write_bank(inventory, reference, OUT / "bank"))
    manifest.write(OUT / "manifest.json")
    source = CheckpointSource(inventory, reference.digest, BankReader(OUT / "bank"))
    checkpoint, rows = OUT / "checkpoint", []

    def from_bank() -> tuple[float, float]:
        variable = {"GAMMA_MANIFEST": str(OUT / "manifest.json")}
        return seconds_to_ready(OUT / "bank", OUT / "bank.log", "--quantization", "gamma", **variable)

    from_bank()  # fills vLLM's own caches
    for repeat in range(REPEATS):
        wall, cpu = from_bank()
        rows.append({"way": "bank", "repeat": repeat, "wall_seconds": wall, "cpu_seconds": cpu, "new_bytes": 0})
        start, start_cpu = time.perf_counter(), time.process_time()
        report = export_checkpoint(manifest, source, checkpoint, ExportSettings(overwrite=True))
        exported, exported_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        wall, cpu = seconds_to_ready(checkpoint, OUT / "checkpoint.log")
        row = {"way": "export", "repeat": repeat, "wall_seconds": exported + wall, "cpu_seconds": exported_cpu + cpu}
        rows.append(row | {"export_wall_seconds": exported, "new_bytes": sum(report.written.values())})
    for row in rows:
        print(row)
    bank, exported = (min(row["cpu_seconds"] for row in rows if row["way"] == way) for way in ("bank", "export"))
    text = "CPU seconds from a manifest to a ready server, from the bank over by export"
    claims = [claim(text, round(bank / exported, 3), "<= 1", bank <= exported)]
    print(f"written: {write_result('bank', 'make bench-bank', [SEED], rows, claims).relative_to(ROOT)}")
    shutil.rmtree(OUT)


if __name__ == "__main__":
    main()
