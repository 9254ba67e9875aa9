"""What vLLM 0.29 cannot do, which the declared range begins with (`make test-versions`)."""

import pytest

from tests.skips import lacking


def _is_030() -> bool:
    try:
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except ImportError:
        return False
    return hasattr(QuantizationConfig, "get_checkpoint_weight_mapper")


IS_030 = _is_030()
needs_030 = pytest.mark.skipif(not IS_030, reason=lacking("vllm", "this vLLM is older than 0.30"))
