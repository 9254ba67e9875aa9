"""The vLLM plugin that serves gamma checkpoints: modules of different widths, also inside one fused layer.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every one of its
processes. Importing this package imports neither torch nor vllm.

Environment variables, read by `gamma_vllm.kernels.choose`, `gamma_vllm.kernels.ark` and `gamma_vllm.bank_loading`:

- `GAMMA_KERNEL` = `auto` (default), `humming`, `native`, `ark` or `torch`: which kernels multiply. A kernel that is
  asked for and cannot run is an error that says why.
- `GAMMA_ARK_COMPUTE` = `fp32` (default), `bf16` or `int8`: in what the ARK kernels compute.
- `GAMMA_MANIFEST` = path: the manifest to serve when the model is a bank; `GAMMA_VERIFY` = `1`: digests are compared.
"""

__all__ = ["register"]


def register() -> None:
    """Make `quant_method: gamma` known to vLLM. May be called any number of times."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from gamma_vllm.compatibility import check_version
    from gamma_vllm.config import GammaConfig

    check_version()
    register_quantization_config(GammaConfig.NAME)(GammaConfig)
