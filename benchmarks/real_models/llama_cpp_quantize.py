"""Quantizes a GGUF file with llama.cpp's own library, in a process of its own.

python llama_cpp_quantize.py SOURCE TARGET FILE_TYPE_NUMBER IMATRIX.safetensors
"""

import sys
from pathlib import Path

from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from safetensors.numpy import load_file


def main(source: str, target: str, file_type: str, imatrix: str) -> None:
    ffi, library = get_ffi(), get_lib()
    importance = load_file(imatrix)
    kept = [
        (ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", values)) for name, values in importance.items()
    ]
    entries = ffi.new("struct llama_model_imatrix_data[]", len(kept) + 1)  # an entry without a name ends it
    for entry, (name, values) in zip(entries, kept, strict=False):
        entry.name, entry.data, entry.size = name, values, len(values)
    parameters = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    parameters.ftype, parameters.imatrix, parameters.nthread = int(file_type), entries, 2
    library.llama_backend_init()
    if library.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantize {source}")
    print(f"{Path(target).name}: {Path(target).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
