"""Quantizers, pure functions from a weight to codes, scales, zero points; and the bank: every module at every width."""

from allocator.quantize.bank_builder import build_bank
from allocator.quantize.bank_reader import BankReader, make_servable
from allocator.quantize.candidates import BlockCandidates, VocabularyCandidates
from allocator.quantize.channel_order import in_order
from allocator.quantize.learned_rounding import LearnedRounding
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Quantizer, Statistics
from allocator.quantize.registry import get_quantizer, quantizer_names

__all__ = [
    "BankReader",
    "BlockCandidates",
    "InputStatistics",
    "LearnedRounding",
    "QuantizedModule",
    "Quantizer",
    "Statistics",
    "VocabularyCandidates",
    "build_bank",
    "get_quantizer",
    "in_order",
    "make_servable",
    "quantizer_names",
]
