"""GAMMA's offline half: learn which modules deserve bits, solve for a budget, write the checkpoint.

Importing this package is light: no torch, no vllm. Sub-packages follow the data flow
inventory -> candidates -> learning -> solving -> exporting; `allocator.contract` holds what all agree on.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
