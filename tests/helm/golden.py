"""What the examples are expected to become: `python -m tests.helm.golden` writes it anew; look at the diff."""

from pathlib import Path
from typing import Any

import yaml

from tests.helm.charts import CHART, CLOUDS, EXAMPLES, Helm, Object, render

__all__ = ["CASES", "GOLDEN", "compact", "expand"]

GOLDEN = Path(__file__).parent / "golden"
# Two kinds of profile that every cloud names in its own way.
_FOR_CLOUDS = {
    "store": {"url": "s3://models/gamma"},
    "disruptionBudget": {"enabled": False},
    "test": {"enabled": False},
    "allocations": [
        {"name": "large", "model": "Qwen3-32B", "gpu": "h100", "count": 2},
        {"name": "small", "model": "Qwen3-8B", "gpu": "any-24gb"},
    ],
}
# Name -> values.
CASES: dict[str, list[Path | dict[str, Any]]] = {name: [path] for name, path in EXAMPLES.items()}
CASES |= {f"cloud-{name}": [path, _FOR_CLOUDS] for name, path in CLOUDS.items()}


def compact(objects: list[Object]) -> list[Object]:
    """Files of the chart that objects carry are replaced by their names, when they are the same."""
    return [_replace(item, {content: name for name, content in _carried().items()}) for item in objects]


def expand(objects: list[Object]) -> list[Object]:
    """The opposite of `compact`."""
    return [_replace(item, _carried()) for item in objects]


def _carried() -> dict[str, str]:
    return {f"<{name}>": (CHART / name).read_text().rstrip("\n") for name in ("files/check.py", "files/dashboard.json")}


def _replace(item: Any, texts: dict[str, str]) -> Any:
    if isinstance(item, dict):
        return {key: _replace(value, texts) for key, value in item.items()}
    if isinstance(item, list):
        return [_replace(value, texts) for value in item]
    return texts.get(item, item) if isinstance(item, str) else item


class _Dumper(yaml.SafeDumper):
    """Lists are indented; nothing is aliased."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, files in CASES.items():
        text = yaml.dump_all(compact(render(Helm("helm4"), *files)), Dumper=_Dumper, sort_keys=False, width=200)
        (GOLDEN / f"{name}.yaml").write_text(text)


if __name__ == "__main__":
    main()
