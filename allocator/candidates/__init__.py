"""The bank of candidates: every module at every width, quantized once and stored packed."""

from allocator.candidates.block import BlockCandidates, VocabularyCandidates
from allocator.candidates.build import build_bank
from allocator.candidates.channels import find_channel_order
from allocator.candidates.reader import BankReader
from allocator.candidates.servable import make_servable

__all__ = ["BankReader", "BlockCandidates", "VocabularyCandidates", "build_bank", "find_channel_order", "make_servable"]
