"""Measured steps on manifests: verified against the best uniform plans of their budget, refined by local search."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from allocator.contract.digest import digest_bytes
from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.manifest import Manifest, Refinement, Verification
from allocator.contract.modules import is_in_block
from allocator.contract.resident import Residency
from allocator.contract.scores import Scores
from allocator.evaluate.refinement import RefineSettings, refine
from allocator.evaluate.student import Student
from allocator.run.progress import Progress, silent
from allocator.solve.units import NO_RULES, Rules

__all__ = [
    "open_student",
    "refine_manifest",
    "uniform_assignments",
    "verify_against_uniform",
]


def uniform_assignments(
    scores: Scores,
    budget_bytes: int,
    rules: Rules = NO_RULES,
    used_bytes: Callable[[dict[str, ModuleFormat]], int] | None = None,
) -> list[dict[str, ModuleFormat]]:
    """The widest width that all modules can have together within `budget_bytes`, and the widest that those of the
    blocks can have with embedding and lm_head as wide as they come, which is what a uniform checkpoint usually is.

    A module that rules forbid a width gets the nearest that they allow, one without it the next narrower that it
    has. `used_bytes` says what an assignment takes of the budget; without it, all tensors of the checkpoint count.
    Empty if no width fits; one plan where both are the same.
    """
    if used_bytes is None:

        def used_bytes(assignment: dict[str, ModuleFormat]) -> int:
            return scores.other_bytes + sum(map(module_bytes, assignment.values()))

    allowed = rules.allowed(scores)
    forms = {name: sorted((c.format for c in cs), key=lambda f: f.num_bits) for name, cs in allowed.items()}
    widths = sorted({form.num_bits for of_module in forms.values() for form in of_module})
    found: list[dict[str, ModuleFormat]] = []
    for wide in (False, True):
        best = None
        for bits in widths:
            plan = {
                name: of_module[-1] if wide and not is_in_block(name) else _nearest(of_module, bits)
                for name, of_module in forms.items()
            }
            if used_bytes(plan) <= budget_bytes:
                best = plan
        if best is not None and best not in found:
            found.append(best)
    return found


def _nearest(forms: list[ModuleFormat], bits: int) -> ModuleFormat:
    return next((form for form in reversed(forms) if form.num_bits <= bits), forms[0])


def open_student(model: Path, bank: Path, texts: list[Path], sequences: int, length: int, seed: int) -> Student:
    """The model and its candidates on windows of `texts`. Raises InputError, ContractError."""
    import torch

    from allocator.blocks import BlockStream
    from allocator.blocks.calibration import calibration_from_text
    from allocator.model import read_inventory
    from allocator.quantize import BankReader

    inventory = read_inventory(model)
    tokens = calibration_from_text(model, texts, sequences, inventory.sequence_length(length), seed).token_ids
    candidates = BankReader(bank)
    stream = BlockStream(candidates.arranged(inventory), "cuda" if torch.cuda.is_available() else "cpu")
    return Student(stream, candidates, tokens)


def verify_against_uniform(
    manifest: Manifest,
    scores: Scores,
    student: Student,
    rules: Rules = NO_RULES,
    residency: Residency | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Measure `manifest` and the uniform plans of its budget (see `uniform_assignments`), and keep the best; its figure
    and that of the best uniform plan are recorded.

    Never worse than uniform on the text of `student`. Where no uniform plan fits, the manifest is returned as it is.
    `residency` is that of the plan which gave a budget in bytes after loading: then the uniform plan is one that fits
    every rank. Raises InputError for a bank or scores of another model, and for such a budget without `residency`.
    """
    _check(manifest, scores, student)
    if (manifest.budget.kind == "resident") != (residency is not None):
        raise InputError("a budget in bytes after loading is verified with the plan that gave it, others without one")
    plans = uniform_assignments(
        scores, manifest.budget.nbytes, rules,
        used_bytes=None if residency is None else lambda assignment: max(residency.stage_bytes(assignment)),
    )  # fmt: skip
    if not plans:
        return manifest
    measured = [
        (float(student.losses(assignment).kl.mean()), assignment)
        for assignment in progress.over([manifest.modules, *plans], "verifying", "assignment")
    ]
    ours = measured[0][0]
    theirs, plan = min(measured[1:], key=lambda pair: pair[0])
    free = [name for name, module in scores.modules.items() if len(module.candidates) > 1]
    bits = _most_common(plan[name].num_bits for name in free if is_in_block(name))
    outside = _most_common(plan[name].num_bits for name in free if not is_in_block(name))
    found = Verification(
        text_digest=_text_digest(student),
        tokens=student.token_ids.numel(),
        kl=ours,
        uniform_kl=theirs,
        uniform_bits=bits or 16,
        uniform_vocabulary_bits=None if outside == bits else outside,
        kept="uniform" if theirs < ours else "assignment",
    )
    if theirs < ours:
        resident = None if residency is None else max(residency.stage_bytes(plan))
        budget = manifest.budget.model_copy(update={"resident_bytes": resident})
        return _with_modules(manifest, plan, method="uniform", budget=budget, verification=found)
    return manifest.model_copy(update={"verification": found})


def refine_manifest(
    manifest: Manifest, scores: Scores, student: Student, minutes: float, rules: Rules, progress: Progress = silent
) -> Manifest:
    """`manifest` improved for up to `minutes` by changes that measure better on the text of `student`.

    Raises InputError for a bank or scores of another model, and for a budget in bytes after loading.
    """
    _check(manifest, scores, student)
    if manifest.budget.kind is not None:
        raise InputError("the budget is in bytes after loading; only one in bytes of the checkpoint can be refined")
    settings = RefineSettings(manifest.budget.nbytes, 60 * minutes, rules)
    found = refine(student, scores, manifest.modules, settings, progress)
    refinement = Refinement(
        text_digest=_text_digest(student),
        tokens=student.token_ids.numel(),
        kl_before=found.kl_before,
        kl=found.kl,
        tried=found.tried,
        kept=found.kept,
    )
    if not found.kept:
        return manifest.model_copy(update={"refinement": refinement})
    return _with_modules(manifest, found.assignment, method=f"{scores.method} refined", refinement=refinement)


def _most_common(widths: Iterable[int]) -> int | None:
    counted = Counter(widths).most_common(1)
    return counted[0][0] if counted else None


def _with_modules(manifest: Manifest, assignment: dict[str, ModuleFormat], **changes: object) -> Manifest:
    sizes = {name: module_bytes(assignment[name]) for name in manifest.modules}
    update = {
        "modules": {name: assignment[name] for name in manifest.modules},
        "module_bytes": sizes,
        "tensor_bytes": manifest.other_bytes + sum(sizes.values()),
        "proof": None,  # it was of another assignment
    }
    changed = manifest.model_copy(update=update | changes)
    return Manifest.parse(changed.payload() | {"digest": changed.digest}, "manifest")


def _check(manifest: Manifest, scores: Scores, student: Student) -> None:
    if scores.digest != manifest.scores_digest:
        raise InputError(f"the manifest was solved from scores {manifest.scores_digest}, given are {scores.digest}")
    if student.bank.bank.digest != manifest.bank_digest:
        raise InputError(f"the manifest is of bank {manifest.bank_digest}, given is {student.bank.bank.digest}")


def _text_digest(student: Student) -> str:
    return digest_bytes(student.token_ids.contiguous().cpu().numpy().tobytes())
