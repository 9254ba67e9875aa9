"""LAMBADA and BLiMP by lm-eval: its own tasks and its own scoring, on documents spread evenly over each task.

The documents are files in a folder: lambada/lambada_test.jsonl (the OpenAI variant) and blimp/BLiMP.zip.
"""

import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.contract.errors import InputError
from benchmarks.real_models.packages import use_packages

__all__ = ["Tasks"]

_BATCH = 8
Documents = list[dict[str, Any]]


@dataclass(frozen=True)
class Tasks:
    """`documents`: how many of LAMBADA, and about as many of BLiMP, the same number of each of its 67 paradigms."""

    folder: Path
    documents: int

    def check(self) -> None:
        """Raises InputError for what is not there."""
        for path in (self._lambada, self._blimp):
            if not path.is_file():
                raise InputError(f"{path}: no such file; --tasks names the folder that has it, or --documents 0")

    def measure(self, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
        """Of a causal language model: by task the documents, `accuracy` with its standard error, and of LAMBADA the
        perplexity of the last word. BLiMP's error is pooled over its paradigms, as lm-eval does."""
        use_packages("requirements-lm-eval.txt", "lm-eval")
        from lm_eval.api.metrics import pooled_sample_stderr
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that it is given
        lambada, paradigms = self._documents()
        tasks = [_task("lambada/lambada_openai.yaml", "lambada_openai", lambada)]
        tasks += [_task("blimp/_template_yaml", name, found) for name, found in paradigms.items()]
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
            tasks=tasks, bootstrap_iters=0, log_samples=False,
        )["results"]  # fmt: skip
        of_blimp = [(found[name], len(docs)) for name, docs in paradigms.items()]
        sizes = [size for _, size in of_blimp]
        accuracy = sum(entry["acc,none"] * size for entry, size in of_blimp) / sum(sizes)
        errors = [_standard_error(entry["acc,none"], size) for entry, size in of_blimp]
        last_words = found["lambada_openai"]
        return {
            "LAMBADA": _rounded(
                {
                    "documents": len(lambada),
                    "accuracy": last_words["acc,none"],
                    "accuracy_error": _standard_error(last_words["acc,none"], len(lambada)),
                    "perplexity": last_words["perplexity,none"],
                }
            ),
            "BLiMP": _rounded(
                {
                    "documents": sum(sizes),
                    "accuracy": accuracy,
                    "accuracy_error": pooled_sample_stderr(errors, sizes),
                }
            ),
        }

    @property
    def _lambada(self) -> Path:
        return self.folder / "lambada" / "lambada_test.jsonl"

    @property
    def _blimp(self) -> Path:
        return self.folder / "blimp" / "BLiMP.zip"

    def _documents(self) -> tuple[Documents, dict[str, Documents]]:
        lambada = _spread(self._lambada.read_text().splitlines(), self.documents)
        with zipfile.ZipFile(self._blimp) as archive:
            files = [name for name in archive.namelist() if name.startswith("data/") and name.endswith(".jsonl")]
            each = max(2, round(self.documents / len(files)))  # one alone has no standard error
            paradigms = {Path(f).stem: _spread(archive.read(f).decode().splitlines(), each) for f in sorted(files)}
        return lambada, paradigms


def _spread(lines: Sequence[str], count: int) -> Documents:
    count = min(count, len(lines))
    return [json.loads(lines[i * len(lines) // count]) for i in range(count)]


def _task(definition: str, name: str, documents: Documents) -> Any:
    """lm-eval's task `definition`, a file among its tasks, on these documents."""
    import lm_eval
    import yaml
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / definition).read_text())
    split = config.get("test_split") or config["validation_split"]
    return ConfigurableTask(config=config | {"task": name, "custom_dataset": _given(split, documents)})


def _given(split: str, documents: Documents) -> Callable[..., Any]:
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict({split: Dataset.from_list(documents)})
    return lambda **_: dataset


def _standard_error(accuracy: float, documents: int) -> float:
    """Of a mean of zeros and ones, as lm-eval's `mean_stderr`, which it leaves out where it draws no bootstrap."""
    return float((accuracy * (1 - accuracy) / (documents - 1)) ** 0.5)


def _rounded(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: value if isinstance(value, int) else round(float(value), 5) for key, value in figures.items()}
