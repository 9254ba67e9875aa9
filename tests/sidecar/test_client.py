"""The Python client and `gamma remote`: the same schemas as the service, the same answers."""

import json
from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.sidecar.client import Client, ServiceError
from allocator.sidecar.schemas import Allocation

from .conftest import gamma
from .serving import Running, running


def test_the_client_does_what_the_api_does(sidecar: Running) -> None:
    client = Client(sidecar.url)
    assert client.health()
    assert {m.name for m in client.models()} == {"tiny", "Qwen3-32B"}
    assert any(gpu.id == "l4" for gpu in client.gpus())
    assert client.node().state == "off"
    plan = client.plan(model="Qwen3-32B", gpu="l4", max_model_len=4096)
    assert plan.verdict.fits
    allocation = client.allocate(model="tiny", average_bits=4.2)
    assert client.allocation(allocation.id) == allocation
    assert client.manifest(allocation.manifest_digest).tensor_bytes == allocation.tensor_bytes
    other = client.allocate(model="tiny", average_bits=3.2, keep=False)
    assert client.diff(other.manifest_digest, allocation.manifest_digest)["changed"]
    assert len(client.sweep(model="tiny", points=3).points) == 3
    job = client.wait(client.make_checkpoint(allocation.manifest_digest))
    assert job.state == "succeeded"
    assert allocation in list(client.allocations())
    assert allocation.manifest_digest in {one.id for one in client.manifests()}
    assert job.id in {one.id for one in client.jobs()}
    with pytest.raises(ServiceError, match="succeeded already"):
        client.cancel(job.id)
    whole = client.allocate(model="tiny", average_bits=3.1, keep=False, manifest=True)
    assert client.manifest_of(whole).digest == whole.manifest_digest
    fit = client.fit(model="Qwen3-32B", hardware={"gpu": "l4", "max_model_len": 4096})
    assert client.manifest_of(fit.allocation).model.digest == fit.allocation.model_digest
    by_request = client.diff({"allocation": {"model": "tiny", "average_bits": 3.1}}, allocation.manifest_digest)
    assert by_request["before"]["digest"] == whole.manifest_digest


def test_allocations_that_name_a_solver_are_read_but_not_asked_for(sidecar: Running) -> None:
    """Stores have them of the time when there were several."""
    made = sidecar.post("/v1/allocations", {"model": "tiny", "average_bits": 4.2})
    stored = made | {"request": made["request"] | {"solver": "cp-sat"}}
    assert Allocation.model_validate(stored) == Allocation.model_validate(made)
    error = sidecar.post("/v1/allocations", stored["request"], 422)["error"]
    assert (error["param"], error["message"]) == ("solver", "Extra inputs are not permitted (at solver)")


def test_the_client_says_what_is_wrong(sidecar: Running) -> None:
    client = Client(sidecar.url)
    with pytest.raises(InputError, match="exactly one"):
        client.allocate(model="tiny")
    with pytest.raises(ServiceError, match="unit 'parsec'") as caught:
        client.allocate(model="tiny", budget="1parsec")
    assert (caught.value.status, caught.value.param, caught.value.exit_code) == (400, "budget", 2)
    with pytest.raises(ServiceError, match="below the smallest") as caught:
        client.allocate(model="tiny", budget="1kB")
    assert caught.value.exit_code == 4
    with pytest.raises(InputError, match="no digest"):
        client.manifest("../x")
    with pytest.raises(InputError, match="does not answer"):
        Client("http://127.0.0.1:9").models()
    with pytest.raises(InputError, match="no address"):
        Client("ftp://x")


def test_remote_verbs_print_what_the_local_ones_compute(
    sidecar: Running, learned: tuple[Path, Path], tmp_path: Path
) -> None:
    url = ["--url", sidecar.url]
    gamma("remote", "allocate", "tiny", "--budget", "180kB", "--out", tmp_path / "remote.json", *url)
    gamma("solve", learned[1] / "scores.json", "--budget", "180kB", "--out", tmp_path / "local.json")
    assert (tmp_path / "remote.json").read_bytes() == (tmp_path / "local.json").read_bytes()
    digest = Manifest.read(tmp_path / "remote.json").digest
    made = json.loads(gamma("remote", "checkpoint", digest, "--json", *url).stdout)
    assert made["state"] == "succeeded"
    assert made["id"] in gamma("remote", "jobs", *url).stdout
    assert "succeeded already" in gamma("remote", "cancel", made["id"], *url, code=3).stderr
    assert "deleted" in gamma("remote", "delete-job", made["id"], *url).stdout
    assert made["id"] not in gamma("remote", "jobs", *url).stdout
    assert "tiny" in gamma("remote", "models", *url).stdout
    assert "l4" in gamma("remote", "gpus", *url).stdout
    assert "fits at" in gamma("remote", "plan", "Qwen3-32B", "--gpu", "l4", "--max-model-len", 4096, *url).stdout
    no = gamma("remote", "plan", "Qwen3-32B", "--gpu", "rtx4060", "--max-model-len", 40960, "--json", *url, code=4)
    assert not json.loads(no.stdout)["verdict"]["fits"]
    assert "nats" in gamma("remote", "sweep", "tiny", "--points", 3, *url).stdout
    assert "feasible are" in gamma("remote", "allocate", "tiny", "--budget", "1kB", *url, code=4).stderr
    assert "needs --gpu" in gamma("remote", "plan", "tiny", "--max-model-len", 5, *url, code=2).stderr


def test_a_token_comes_from_the_environment(store: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("read reader-token-0123456789\n")
    with running(tmp_path / "log", "--store", store, "--token-file", tokens) as service:
        assert "bearer token" in gamma("remote", "models", "--url", service.url, code=2).stderr
        found = gamma("remote", "models", GAMMA_URL=service.url, GAMMA_TOKEN="reader-token-0123456789")
        assert "tiny" in found.stdout
