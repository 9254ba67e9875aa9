"""What Prometheus reads at /metrics: requests, solves, jobs, plans and the manifest in service."""

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

__all__ = ["Metrics"]

_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SOLVE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAPS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)


class Metrics:
    """One registry a service. Labels are bounded: routes are templates, models and GPUs those that are known."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "gamma_sidecar_requests", "Answers by route, method and status.", ["route", "method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "gamma_sidecar_request_duration_seconds", "Time from the first byte of a request to its answer.", ["route"],
            buckets=_REQUEST_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.solve_seconds = Histogram(
            "gamma_solve_duration_seconds", "Time to solve one assignment, cached answers not counted.",
            buckets=_SOLVE_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.solve_gap = Histogram(
            "gamma_solve_gap_ratio", "Proven distance from the optimum, as a part of the objective.",
            buckets=_GAPS, registry=self.registry,
        )  # fmt: skip
        self.solves_cut = Counter(
            "gamma_solves_cut", "Solves that ended at --solver-seconds, before their assignment was proven best.",
            registry=self.registry,
        )  # fmt: skip
        self.job_failures = Counter(
            "gamma_job_failures", "Checkpoint jobs that failed here since this process began.", registry=self.registry
        )
        self.jobs = Gauge("gamma_jobs", "Checkpoint jobs by state.", ["state"], registry=self.registry)
        self.headroom = Gauge(
            "gamma_plan_headroom_bytes", "Bytes a rank that the plan in service leaves above the smallest weights.",
            ["model", "gpu"], registry=self.registry,
        )  # fmt: skip
        self.manifest = Gauge(
            "gamma_manifest_info", "The manifest in service on this node.", ["model", "manifest", "method"],
            registry=self.registry,
        )  # fmt: skip
        self.store_reachable = Gauge(
            "gamma_store_reachable", "1 while the store answers, 0 while it does not.", registry=self.registry
        )
        self.unreadable_entries = Gauge(
            "gamma_store_unreadable_entries", "Entries of the store that are left out because they cannot be read.",
            registry=self.registry,
        )  # fmt: skip
        self.unusable_token_files = Gauge(
            "gamma_sidecar_unusable_token_files", "Token files that cannot be used: their tokens are refused.",
            registry=self.registry,
        )  # fmt: skip
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def observe(self, route: str, method: str, code: int, seconds: float) -> None:
        """One answered request."""
        key = (route, method, code)
        children = self._children.get(key)
        if children is None:
            children = self.requests.labels(route, method, str(code)), self.request_seconds.labels(route)
            self._children[key] = children
        children[0].inc()
        children[1].observe(seconds)

    def set_jobs(self, counts: Mapping[str, int]) -> None:
        for state in ("queued", "running", "succeeded", "failed", "cancelled"):
            self.jobs.labels(state).set(counts.get(state, 0))

    def text(self) -> bytes:
        return generate_latest(self.registry)
