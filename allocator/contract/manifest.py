"""The manifest: one width for every module, the budget it fits, the solver's proof, and where all of it came from."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from allocator.contract.bank import ModelReference
from allocator.contract.channel_blocks import ChannelBlocks, Parents
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.layout import Dtype16, ModuleFormat, module_bytes
from allocator.contract.scores import Scores

__all__ = ["MANIFEST_NAME", "Budget", "Manifest", "Proof", "Refinement", "Tuning", "Verification", "average_bits"]

MANIFEST_NAME = "gamma_manifest.json"


class Budget(Strict):
    """What was asked for in words, the same ones for the same amount (`2000000 bytes`, `3.25 bits`), and in bytes.

    They are bytes of checkpoint tensors, or, where `kind` says "resident", bytes of weights that a rank of vLLM holds
    after loading: then `resident_bytes` is what the assignment takes on the tightest rank.
    """

    requested: str
    nbytes: int = Field(ge=1)
    kind: Literal["resident"] | None = None
    resident_bytes: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _resident_bytes_are_of_a_rank(self) -> "Budget":
        if (self.kind is None) != (self.resident_bytes is None):
            raise ValueError("resident_bytes stand in a budget of kind resident, and only there")
        return self

    def used(self, tensor_bytes: int) -> int:
        """The bytes that count against the budget of an assignment with `tensor_bytes`."""
        return tensor_bytes if self.resident_bytes is None else self.resident_bytes


class Proof(Strict):
    """What the solver says of the assignment: it minimises the sum of scores; `bound` is a lower bound on it.

    `cut` is true where the time limit ended the search before the best sum of scores was proven, else absent.
    """

    solver: str
    objective: float
    bound: float
    gap: float = Field(ge=0)
    cut: Literal[True] | None = None


class Verification(Strict):
    """KL divergence from the original, nats a token, of the solved assignment and of the best uniform plan of its
    bytes, on the same text; `kept` says which of the two the manifest holds.

    `uniform_bits` is the width of that plan's modules in the blocks, `uniform_vocabulary_bits` that of its embedding
    and lm_head if it is another.
    """

    text_digest: Digest
    tokens: int = Field(ge=1)
    kl: float
    uniform_kl: float
    uniform_bits: int
    uniform_vocabulary_bits: int | None = None
    kept: Literal["assignment", "uniform"]


class Refinement(Strict):
    """A local search on measured KL divergence, nats a token: before, after, and changes tried and kept."""

    text_digest: Digest
    tokens: int = Field(ge=1)
    kl_before: float
    kl: float
    tried: int = Field(ge=0)
    kept: int = Field(ge=0)


class Tuning(Strict):
    """Codes and scales learned after the assignment (`gamma tune`): KL divergence from the original, nats a token, on
    text that was not tuned on, of the candidates of the bank `bank_digest`, of those tuned block by block (`kl_blocks`,
    None where nothing followed) and of those tuned to the end; `kept` says which of them the manifest is of.
    text_digest, tokens: of the text that was tuned on."""

    bank_digest: Digest
    text_digest: Digest
    tokens: int = Field(ge=1)
    kl_before: float
    kl: float
    kept: Literal["candidates", "blocks", "tuned"]
    kl_blocks: float | None = None


class Manifest(Document):
    """`manifest.json`, and `gamma_manifest.json` inside a checkpoint.

    `predicting_bytes` are those of `other_bytes` that belong to layers which predict further tokens (MTP): they are
    kept as they are, at 16 bits, and a server holds them only if it is told to speculate.
    """

    SCHEMA: ClassVar[str] = "gamma.manifest"

    model: ModelReference
    bank_digest: Digest
    scores_digest: Digest | None = None
    method: str
    dtype: Dtype16
    budget: Budget
    tensor_bytes: int
    other_bytes: int = Field(ge=0)
    predicting_bytes: int | None = Field(default=None, ge=1)
    module_bytes: dict[str, int]
    channel_blocks: ChannelBlocks | None = None
    modules: dict[str, ModuleFormat]
    proof: Proof | None = None
    verification: Verification | None = None
    refinement: Refinement | None = None
    tuning: Tuning | None = None

    @classmethod
    def of_scores(
        cls, scores: Scores, assignment: Mapping[str, ModuleFormat], budget: Budget, proof: Proof
    ) -> "Manifest":
        """The manifest of an assignment of the scores' modules, in their order."""
        sizes = {name: module_bytes(assignment[name]) for name in scores.modules}
        return cls(
            model=scores.model,
            bank_digest=scores.bank_digest,
            scores_digest=scores.digest,
            method=scores.method,
            dtype=scores.dtype,
            channel_blocks=scores.channel_blocks,
            budget=budget,
            tensor_bytes=scores.other_bytes + sum(sizes.values()),
            other_bytes=scores.other_bytes,
            predicting_bytes=scores.predicting_bytes,
            module_bytes=sizes,
            modules={name: assignment[name] for name in scores.modules},
            proof=proof,
        )

    @model_validator(mode="after")
    def _originals_are_whole(self) -> "Manifest":
        self.parents.check()
        return self

    @property
    def parents(self) -> Parents:
        """The original model's modules, of which those here are rows."""
        return Parents({name: module.shape for name, module in self.modules.items()}, self.channel_blocks)

    @model_validator(mode="after")
    def _bytes_add_up(self) -> "Manifest":
        if self.modules.keys() != self.module_bytes.keys():
            odd = sorted(self.modules.keys() ^ self.module_bytes.keys())[0]
            raise ValueError(f"{odd}: stands in only one of modules and module_bytes")
        for name, module in self.modules.items():
            expected = module_bytes(module)
            if self.module_bytes[name] != expected:
                raise ValueError(
                    f"{name}: {self.module_bytes[name]} bytes recorded, "
                    f"{module.num_bits} bits at shape {list(module.shape)} are {expected}"
                )
        total = self.other_bytes + sum(self.module_bytes.values())
        if self.tensor_bytes != total:
            raise ValueError(f"tensor_bytes is {self.tensor_bytes}, the parts add up to {total}")
        used = self.budget.used(total)
        if used > self.budget.nbytes:
            raise ValueError(f"the assignment has {used} bytes, over the budget of {self.budget.nbytes}")
        return self


def average_bits(modules: dict[str, ModuleFormat], over: set[str] | None = None) -> float:
    """Stored bits a weight, scales and zero points included, over the modules named `over` (default: all)."""
    chosen = [m for name, m in modules.items() if over is None or name in over]
    parameters = sum(m.shape[0] * m.shape[1] for m in chosen)
    return 8 * sum(map(module_bytes, chosen)) / parameters if parameters else 0.0
