"""Writes README.md from values.yaml and values.schema.json: `python helm/gamma/readme.py`.

A comment block that begins with `# --` documents the key below it.
"""

import json
import re
from pathlib import Path

import yaml

HERE = Path(__file__).parent
_KEY = re.compile(r"^( *)([A-Za-z0-9_]+):")


def documented(text: str) -> dict[str, str]:
    """Path of a value (`store.url`) -> its description, in the order of the file."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = [stripped.removeprefix("# --").strip()]
        elif stripped.startswith("#") and comment:
            comment.append(stripped.removeprefix("#").strip())
        elif match := _KEY.match(line):
            indent = len(match[1])
            path = [(i, key) for i, key in path if i < indent] + [(indent, match[2])]
            if comment:
                found[".".join(key for _, key in path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def value_at(values: dict, path: str):
    for key in path.split("."):
        values = values[key]
    return values


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def value_table() -> str:
    text = (HERE / "values.yaml").read_text()
    values = yaml.safe_load(text)
    rows = ["| Value | Default | What it does |", "| --- | --- | --- |"]
    for path, description in documented(text).items():
        default = json.dumps(value_at(values, path), ensure_ascii=False)
        shown = "see [values.yaml](values.yaml)" if len(default) > 80 else f"`{default}`"
        rows.append(f"| `{path}` | {cell(shown)} | {cell(description)} |")
    return "\n".join(rows)


def allocation_table() -> str:
    definition = json.loads((HERE / "values.schema.json").read_text())["definitions"]["allocation"]
    rows = ["| Field | What it is |", "| --- | --- |"]
    for name, schema in definition["properties"].items():
        needed = " (required)" if name in definition["required"] else ""
        rows.append(f"| `{name}`{needed} | {cell(schema['description'])} |")
    return "\n".join(rows)


def readme() -> str:
    template = (HERE / "README.md.in").read_text()
    return template.replace("<<ALLOCATION>>", allocation_table()).replace("<<VALUES>>", value_table())


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme())
