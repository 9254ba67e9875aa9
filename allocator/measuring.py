"""What `gamma kv` and `gamma sweep --measure` call: losses measured on text, with the models in memory."""

from collections.abc import Sequence
from pathlib import Path

from allocator.contract.bank import ModelReference
from allocator.contract.kv_cache import KvCacheScores
from allocator.progress import Progress, silent

__all__ = ["KV_UNIT", "measure_kv_losses"]

KV_UNIT = "nats of KL divergence a token"
_MEASURED_DTYPES = ("fp8",)


def measure_kv_losses(
    model: Path,
    text: Sequence[Path] | None,
    sequences: int,
    sequence_length: int,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress = silent,
) -> KvCacheScores:
    """What an fp8 KV cache costs `model` on `text` (None: text that the model writes). Raises InputError.

    `work` is a work folder that may remember the model's digest.
    """
    from allocator.blocks import calibration_from_model, calibration_from_text
    from allocator.evaluation.kv_cache import measure_kv_cache
    from allocator.inventory import DIGEST_CACHE_NAME, cached_model_digest, model_digest, read_inventory

    inventory = read_inventory(model)
    progress("reading", 0.0)
    cache = None if work is None else work / DIGEST_CACHE_NAME
    digest = cached_model_digest(inventory, cache) if cache is not None and cache.exists() else model_digest(inventory)
    reference = ModelReference(
        name=model.resolve().name,
        architecture=inventory.architecture,
        digest=digest,
    )
    progress("reading", 1.0)
    length = min(sequence_length, inventory.config.get("max_position_embeddings") or sequence_length)
    if text is None:
        calibration = calibration_from_model(model, sequences, length, seed)
    else:
        calibration = calibration_from_text(model, list(text), sequences, length, seed)
    losses = {}
    for i, dtype in enumerate(_MEASURED_DTYPES):
        progress("KV cache", i / len(_MEASURED_DTYPES))
        found = measure_kv_cache(model, calibration.token_ids, dtype)
        losses[dtype] = found.kl
    progress("KV cache", 1.0)
    return KvCacheScores(
        model=reference, unit=KV_UNIT, calibration_digest=calibration.digest, tokens=found.tokens, losses=losses
    )
