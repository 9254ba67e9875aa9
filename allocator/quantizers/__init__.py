"""Quantizers: pure functions from one module's weight to codes, scales and zero points. One file each."""

from allocator.quantizers.base import InputStatistics, QuantizedModule, Quantizer, Statistics
from allocator.quantizers.registry import get_quantizer, quantizer_names

__all__ = ["InputStatistics", "QuantizedModule", "Quantizer", "Statistics", "get_quantizer", "quantizer_names"]
