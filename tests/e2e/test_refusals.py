"""Damaged checkpoints: the engine does not start, and says which module and which two values disagree."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from allocator.contract.checkpoint import CheckpointConfig  # noqa: E402
from allocator.contract.layout import ModuleFormat, module_bytes  # noqa: E402
from allocator.contract.manifest import MANIFEST_NAME, Manifest  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

Q = "model.layers.0.self_attn.q_proj"


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_width(folder):
    edit(folder, lambda q: q["modules"][Q].update(num_bits=5))


def change_shape(folder):
    edit(folder, lambda q: q["modules"][Q].update(shape=[256, 320]))


def unknown_version(folder):
    edit(folder, lambda q: q.update(schema_version=7))


def unknown_key(folder):
    edit(folder, lambda q: q["modules"][Q].update(act_order=True))


def drop_module(folder):
    edit(folder, lambda q: q["modules"].pop(Q))


def no_manifest(folder):
    (folder / MANIFEST_NAME).unlink()


def edit_manifest(folder):
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"requested": "everything"', '"requested": "nothing"'))


def redeclare(folder):
    """Config and manifest agree on a width that the tensors do not have."""
    manifest = Manifest.read(folder / MANIFEST_NAME)
    modules = manifest.modules | {Q: ModuleFormat.model_validate(manifest.modules[Q].model_dump() | {"num_bits": 3})}
    sizes = {name: module_bytes(module) for name, module in modules.items()}
    total = manifest.other_bytes + sum(sizes.values())
    changed = manifest.model_copy(update={"modules": modules, "module_bytes": sizes, "tensor_bytes": total})
    changed.write(folder / MANIFEST_NAME)
    declared = CheckpointConfig.of_manifest(changed).model_dump(mode="json", exclude_none=True)
    edit(folder, lambda q: q.update(declared))


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


DAMAGES = {
    "cut file": (truncate, ["model.safetensors", "cut short"]),
    "changed width": (change_width, [Q, "5 bits", "4 bits"]),
    "changed shape": (change_shape, [Q, "[256, 320]", "[256, 256]"]),
    "unknown version": (unknown_version, ["schema_version is 7", "reads 1"]),
    "unknown key": (unknown_key, [Q, "act_order"]),
    "module without entry": (drop_module, [Q, "nothing", "4 bits"]),
    "no manifest": (no_manifest, [MANIFEST_NAME, "no such file"]),
    "edited manifest": (edit_manifest, [MANIFEST_NAME, "sha256:", "changed after it was written"]),
    "declared otherwise than stored": (redeclare, [f"{Q}.weight_packed", "[256, 32]", "3 bits", "[256, 24]"]),
    "missing tensor": (change_tensors(lambda t: t.pop(f"{Q}.weight_scale")), [Q, f"{Q}.weight_scale is missing"]),
    "tensor of another width": (
        change_tensors(lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(1, 4, dtype=torch.int32)})),
        [f"{Q}.weight_zero_point", "contradicts the declared width"],
    ),
    "contradicting weight_shape": (
        change_tensors(lambda t: t.update({f"{Q}.weight_shape": torch.tensor([256, 512])})),
        [f"{Q}.weight_shape", "[256, 512]", "[256, 256]"],
    ),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory, checkpoints, run_engines):
    """What the engine says to every damaged checkpoint, and to two things that are no checkpoint of ours."""
    gamma, dequantized = checkpoints("demo")
    folder = tmp_path_factory.mktemp("refusals")
    jobs = [
        {"name": "plain model", "model": str(dequantized), "options": {"quantization": "gamma"}},
        {"name": "unknown kernel", "model": str(gamma), "kernel": "marlin"},
        {"name": "dummy of a changed width", "model": str(folder / "no weights"), "options": {"load_format": "dummy"}},
    ]
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(gamma, folder / name)
        damage(folder / name)
        jobs.append({"name": name, "model": str(folder / name)})
    shutil.copytree(gamma, folder / "no weights", ignore=shutil.ignore_patterns("*.safetensors"))
    change_width(folder / "no weights")
    results = run_engines([{"kernel": "torch", "steps": []} | job for job in jobs], folder)
    return {name: result.get("error", "the engine started") for name, result in results.items()}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(errors, name):
    for expected in DAMAGES[name][1]:
        assert expected in errors[name]


def test_a_dummy_load_without_weights_checks_what_is_there(errors):
    for expected in (Q, "num_bits=5", "num_bits=4"):
        assert expected in errors["dummy of a changed width"]


def test_the_flag_on_a_model_of_another_kind_is_explained(errors):
    assert "serves checkpoints that `gamma export` wrote" in errors["plain model"]


def test_an_unknown_kernel_is_refused(errors):
    assert "GAMMA_KERNEL='marlin': expected auto, humming, native, ark or torch" in errors["unknown kernel"]
