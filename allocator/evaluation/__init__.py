"""What quantization does to a model: KL divergence from the original and perplexity, on text not calibrated on."""

from allocator.evaluation.dequantized import load_dequantized
from allocator.evaluation.divergence import Divergence, measure_divergence

__all__ = ["Divergence", "load_dequantized", "measure_divergence"]
