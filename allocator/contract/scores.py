"""Scores: what each width of each module costs in loss. Solving for a new budget needs only this file."""

import base64
import binascii
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from allocator.contract.bank import ModelReference
from allocator.contract.channel_blocks import ChannelBlocks, Parents
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.layout import Dtype16, ModuleFormat, module_bytes

if TYPE_CHECKING:  # imported late: schemas are read by programs that answer at once
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "KV_CACHE_NAME",
    "Candidate",
    "Fusion",
    "Interactions",
    "KvCacheScores",
    "ScoredModule",
    "Scores",
]

Fusion = Literal["free", "tied"]
"""Whether the modules of a fused group may have widths of their own, or get one."""


class Candidate(Strict):
    """One width of one module: its storage, its exact bytes, and its score (lower is better, in `Scores.unit`)."""

    format: ModuleFormat
    nbytes: int = Field(ge=0)
    score: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _bytes_follow_from_format(self) -> "Candidate":
        expected = module_bytes(self.format)
        if self.nbytes != expected:
            raise ValueError(f"{self.nbytes} bytes at {self.format.num_bits} bits, its format has {expected}")
        return self


class ScoredModule(Strict):
    """All candidates of one module. `fused_group` is the layer that vLLM joins it into."""

    fused_group: str | None = None
    candidates: list[Candidate] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_shape(self) -> "ScoredModule":
        widths = [c.format.num_bits for c in self.candidates]
        if len({c.format.shape for c in self.candidates}) != 1 or len(set(widths)) != len(widths):
            raise ValueError("the candidates of a module must have one shape and different widths")
        return self


class Interactions(Strict):
    """What the errors of two candidates do to each other's loss: the correlation of their errors.

    Candidates are those below 16 bits of all modules that have a choice, in the order of the scores; there are n of
    them. `correlations` is the base64 text of n(n-1)/2 little-endian float16 numbers r_ij, i < j, row by row.
    Candidates i and j, of different modules, cost s_i + s_j + 2 r_ij sqrt(s_i s_j) together, s being their scores.
    `least_eigenvalue` is that of the matrix of the r_ij with 1 on its diagonal and 0 between candidates of one module:
    no assignment costs less than it times the sum of its scores.
    """

    correlations: str
    least_eigenvalue: float

    @classmethod
    def of(cls, correlations: "ArrayLike", least_eigenvalue: float) -> "Interactions":
        """Of the matrix `[n, n]` of the r_ij; what is not above its diagonal does not count."""
        import numpy as np

        matrix = np.asarray(correlations, dtype="<f2")
        content = matrix[np.triu_indices(len(matrix), 1)].tobytes()
        return cls(correlations=base64.b64encode(content).decode(), least_eigenvalue=least_eigenvalue)

    def among(self, numbers: Sequence[int]) -> "NDArray[np.float16]":
        """The r_ij of some of the candidates, their places in rising order: `[k, k]`, 0 on and below the diagonal."""
        import numpy as np

        stored, places = np.frombuffer(self.content(), dtype="<f2"), np.array(numbers, dtype=np.int64)
        count = (1 + math.isqrt(1 + 4 * stored.nbytes)) // 2
        found = np.zeros((len(places), len(places)), dtype=np.float16)
        for row, i in enumerate(places):
            found[row, row + 1 :] = stored[i * count - i * (i + 1) // 2 - i - 1 + places[row + 1 :]]
        return found

    def content(self) -> bytes:
        """The float16 numbers as bytes. Raises ValueError if the text is not base64."""
        try:
            return base64.b64decode(self.correlations, validate=True)
        except binascii.Error as error:
            raise ValueError(f"correlations are not base64 text ({error})") from None


class Scores(Document):
    """`scores.json`. `other_bytes` counts every tensor that is no module of the program (norms, biases);
    `predicting_bytes` those among them that predict further tokens (MTP), where there are any."""

    SCHEMA: ClassVar[str] = "gamma.scores"

    model: ModelReference
    bank_digest: Digest
    dtype: Dtype16
    method: str
    unit: str
    settings: dict[str, Any]
    other_bytes: int = Field(ge=0)
    predicting_bytes: int | None = Field(default=None, ge=1)
    channel_blocks: ChannelBlocks | None = None
    modules: dict[str, ScoredModule]
    interactions: Interactions | None = None

    @model_validator(mode="after")
    def _originals_are_whole(self) -> "Scores":
        self.parents.check()
        return self

    @property
    def parents(self) -> Parents:
        """The original model's modules, of which those here are rows."""
        shapes = {name: module.candidates[0].format.shape for name, module in self.modules.items()}
        return Parents(shapes, self.channel_blocks)

    @model_validator(mode="after")
    def _a_number_for_each_pair(self) -> "Scores":
        if self.interactions is not None:
            count = len(self.interacting())
            found = len(self.interactions.content())
            if found != count * (count - 1):
                raise ValueError(
                    f"interactions have {found} bytes, {count} candidates below 16 bits have {count * (count - 1)}"
                )
            if any(candidate.score < 0 for _, candidate in self.interacting()):
                raise ValueError("scores with interactions must not be negative")
        return self

    def interacting(self) -> list[tuple[str, Candidate]]:
        """Module name and candidate in the order of `Interactions`."""
        return [
            (name, candidate)
            for name, module in self.modules.items()
            if len(module.candidates) > 1
            for candidate in module.candidates
            if candidate.format.quantized
        ]

    def feasible_bytes(self) -> tuple[int, int]:
        """Smallest and largest checkpoint, in bytes of tensors."""
        sizes = [[c.nbytes for c in m.candidates] for m in self.modules.values()]
        return self.other_bytes + sum(map(min, sizes)), self.other_bytes + sum(map(max, sizes))


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
