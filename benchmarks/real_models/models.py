"""Fetches models and makes Hugging Face folders of them.

python -m benchmarks.real_models.models smollm2
"""

import argparse
from pathlib import Path

from benchmarks.real_models.catalogue import MOVED, RealModel, real_models
from benchmarks.real_models.fetch import fetch
from benchmarks.real_models.off_grid import write_rescaled
from benchmarks.real_models.packages import use_packages

__all__ = ["ready"]


def ready(model: RealModel) -> Path:
    """The model's Hugging Face folder, from the cache or made now. Raises InputError if it cannot be had."""
    if (model.folder / "config.json").exists():
        return model.folder
    if model.name.endswith(MOVED):
        stored = ready(real_models([model.name.removesuffix(MOVED)])[0])
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        write_rescaled(stored, model.folder)
    else:
        file = fetch(model)
        use_packages()
        from benchmarks.real_models.gguf_model import folder_from_gguf

        print(f"{model.title}: {file.name} ({model.weights}) as a Hugging Face folder", flush=True)
        folder_from_gguf(file, model.folder, model.tied)
    return model.folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names in models.json; default: all")
    for model in real_models(parser.parse_args().models or None):
        print(f"{model.title}: {ready(model)}", flush=True)


if __name__ == "__main__":
    main()
