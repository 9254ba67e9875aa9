"""What a narrower KV cache costs, in the unit of the scores: an entry of the program beside the weights."""

from typing import ClassVar

from pydantic import Field

from allocator.contract.bank import ModelReference
from allocator.contract.documents import Digest, Document

__all__ = ["KV_CACHE_NAME", "KvCacheScores"]

KV_CACHE_NAME = "kv_cache.json"


class KvCacheScores(Document):
    """`kv_cache.json`, beside `scores.json`: by vLLM's name of the dtype the KL divergence, in nats a token, of the
    16-bit model with such a KV cache from the one with a KV cache of its own dtype ("auto", which costs 0)."""

    SCHEMA: ClassVar[str] = "gamma.kv_cache"

    model: ModelReference
    unit: str
    calibration_digest: Digest
    tokens: int = Field(ge=1)
    losses: dict[str, float] = Field(min_length=1)
