"""What one model's rows are measured with, and where they are kept: a run that is stopped goes on."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from allocator.contract.documents import write_atomically
from allocator.model import read_inventory
from benchmarks.real_models.catalogue import RealModel
from benchmarks.real_models.losses import Reference, TokenLosses
from benchmarks.real_models.off_grid import write_rescaled
from benchmarks.real_models.process import Cost
from benchmarks.real_models.sizes import Sizes
from benchmarks.real_models.tasks import Tasks
from benchmarks.real_models.texts import Text, texts_of

__all__ = ["OFF_GRID", "Bench", "Quantized"]

OFF_GRID = ", off the file's grid"
"""Ends the name of a row that says whether the grid of the file decides a figure."""


class Quantized:
    """What a row is measured from: a causal language model with float32 weights, its sizes and its cost."""

    def __init__(self, model: Any, sizes: Sizes, cost: Cost, more: Mapping[str, Any] | None = None) -> None:
        self.model, self.sizes, self.cost, self.more = model, sizes, cost, dict(more or {})


class Bench:
    """The rows of one model: `folder` is the original, `work` where its cells are; `tasks` are measured for the rows
    that ask for them, and only rows whose names match one of `patterns` are made."""

    def __init__(
        self,
        model: RealModel,
        folder: Path,
        work: Path,
        wikitext: Path,
        sequences: int,
        length: int,
        tasks: Tasks | None = None,
        patterns: Sequence[str] = ("*",),
    ) -> None:
        self.model, self.folder, self.work = model, folder, work
        self._text_settings = wikitext, sequences, length
        self._tasks, self._patterns = tasks, patterns
        (work / "cells").mkdir(parents=True, exist_ok=True)
        self.inventory = read_inventory(folder)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def texts(self) -> list[Text]:
        return texts_of(self.tokenizer, *self._text_settings)

    @cached_property
    def references(self) -> dict[str, Reference]:
        """The original on each text; its states are kept beside the rows."""
        original = self.load(self.folder)
        return {text.name: self._reference(original, text) for text in self.texts}

    def _reference(self, original: Any, text: Text) -> Reference:
        path = self.work / f"original.{text.name}.{text.digest.removeprefix('sha256:')[:16]}.safetensors"
        if path.exists():
            return Reference(text.token_ids, load_file(path)["states"], original.lm_head)
        reference = Reference.of(original, text.token_ids)
        partial = path.with_suffix(".partial")
        save_file({"states": reference.states}, partial)
        partial.replace(path)
        return reference

    @cached_property
    def off_grid(self) -> "Bench":
        """The like for the model with its weights off the grid of the file that they come from: a model of its own, so
        that what it loses is measured against itself."""
        folder = self.work / "off-grid" / "model"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            write_rescaled(self.folder, folder)
        other = Bench(self.model, folder, folder.parent, *self._text_settings)
        other.texts = self.texts
        return other

    def take_off_grid(self, name: str) -> None:
        """Make a row of `off_grid` one of this bench too."""
        for path in [self.off_grid.path(name), *(self.off_grid.losses_path(name, text.name) for text in self.texts)]:
            shutil.copy(path, self.work / "cells")

    @property
    def weights(self) -> int:
        """Of layers and head."""
        return sum(
            rows * columns for rows, columns in (m.shape for m in self.inventory.modules if self._counted(m.name))
        )

    def _counted(self, name: str) -> bool:
        return ".layers." in name or "lm_head" in name or self.model.tied

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The causal language model in `folder`."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)

    def with_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """The original with other weights, by name; each takes the place of its own as it comes, so that memory holds
        one model and no second one."""
        model = self.load(self.folder)
        for name, weight in weights:
            model.get_parameter(name).data = weight.float()
        return model

    def wants(self, name: str) -> bool:
        """Whether the row is among those that are to be made."""
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def may_want(self, beginning: str) -> bool:
        """Whether the name of a row that is to be made can begin so."""
        certain = [re.split(r"[*?\[]", pattern)[0] for pattern in self._patterns]
        return any(beginning.startswith(start) or start.startswith(beginning) for start in certain)

    def cell(
        self, name: str, make: Callable[[], Quantized], source: str = "", with_tasks: bool = True
    ) -> dict[str, Any]:
        """The row `name`, from the work folder or made and measured now; empty if it is not wanted. A cell of other
        texts, of another `source` (a digest of what it is made from), or of other documents of the tasks, is made
        again."""
        if not self.wants(name):
            return {}
        tasks = self._tasks if with_tasks else None
        made_of = {"texts": {text.name: text.digest for text in self.texts}, "source": source}
        made_of |= {} if tasks is None else {"documents": tasks.documents}
        path = self.path(name)
        if path.exists():
            kept = json.loads(path.read_text())
            if all(kept.get(key) == value for key, value in made_of.items()):
                return dict(kept)
        begun = time.monotonic()
        references = self.references  # before there is another model in memory
        quantized = make()
        row: dict[str, Any] = {"model": self.model.name, "row": name} | made_of
        row |= quantized.sizes.record() | quantized.cost.record() | quantized.more
        for text, reference in references.items():
            losses = reference.losses(quantized.model)
            losses.save(self.losses_path(name, text))
            row[text] = {key: round(value, 6) for key, value in losses.summary().items()}
        if tasks is not None:
            row |= tasks.measure(quantized.model, self.tokenizer)
        write_atomically(path, json.dumps(row, indent=1) + "\n")
        first = row[self.texts[0].name]
        print(
            f"{self.model.name} {name}: {row['tensor_bytes'] / 1e6:.1f} MB, KL {first['kl']:.4f}, top-1 "
            f"{100 * first['top1']:.1f} %, perplexity {first['perplexity']:.2f} ({time.monotonic() - begun:.0f} s)",
            flush=True,
        )
        return row

    def path(self, name: str) -> Path:
        return self.work / "cells" / f"{name.replace(' ', '_').replace('/', '-')}.json"

    def losses_path(self, name: str, text: str) -> Path:
        return self.path(name).with_suffix(f".{text.replace(' ', '_')}.npz")

    def rows(self) -> list[dict[str, Any]]:
        """All that were measured."""
        return [json.loads(path.read_text()) for path in sorted((self.work / "cells").glob("*.json"))]

    def losses(self, name: str, text: str) -> TokenLosses:
        return TokenLosses.load(self.losses_path(name, text))
