"""What a server tells of the manifest it serves: one line in the log, and gauges in vLLM's /metrics."""

from collections import Counter

from prometheus_client import REGISTRY, Gauge
from vllm.logger import init_logger

from allocator.contract.manifest import Manifest, average_bits

__all__ = ["announce", "describe"]

_SERVED: dict[str, Gauge] = {}


def describe(manifest: Manifest, source: str) -> str:
    """Budget, bytes, histogram of widths and digest of a manifest, on one line."""
    counts = Counter(module.num_bits for module in manifest.modules.values())
    widths = ", ".join(f"{counts[b]} at {b}" for b in sorted(counts))
    quantized = {name for name, module in manifest.modules.items() if module.quantized}
    return (
        f"gamma: {source}: {manifest.tensor_bytes} bytes of {manifest.budget.nbytes} (budget "
        f"{manifest.budget.requested}), {len(manifest.modules)} modules by bits: {widths}; "
        f"{average_bits(manifest.modules, quantized):.2f} bits a weight where below 16; manifest {manifest.digest}"
    )


def announce(manifest: Manifest, source: str) -> None:
    """Log the line and set the gauges `gamma_manifest_info`, `gamma_weight_bytes` and `gamma_modules`.

    vLLM makes its config, and so calls this, in the process that answers /metrics.
    """
    init_logger("vllm.gamma").info(describe(manifest, source))
    labels = {"model": manifest.model.name, "manifest": manifest.digest}
    about = {"model_digest": manifest.model.digest, "method": manifest.method, "budget": manifest.budget.requested}
    info = _gauge("gamma_manifest_info", "The manifest that is served; its value is 1.", (*labels, *about))
    info.labels(**labels, **about).set(1)
    size = _gauge("gamma_weight_bytes", "Bytes of all tensors of the checkpoint.", tuple(labels))
    size.labels(**labels).set(manifest.tensor_bytes)
    modules = _gauge("gamma_modules", "Modules of the checkpoint, by width.", (*labels, "num_bits"))
    for num_bits, count in Counter(m.num_bits for m in manifest.modules.values()).items():
        modules.labels(**labels, num_bits=str(num_bits)).set(count)


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> Gauge:
    """The gauge of that name; made once a process, as prometheus_client wants it."""
    if name not in _SERVED:
        _SERVED[name] = Gauge(name, text, labels, registry=REGISTRY, multiprocess_mode="mostrecent")
    return _SERVED[name]
