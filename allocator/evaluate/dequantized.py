"""A gamma checkpoint as an ordinary transformers model, its modules dequantized: the judge of every kernel."""

from pathlib import Path
from typing import Any

import torch

from allocator.blocks.hf_model import open_config
from allocator.blocks.tensors import read_tensor
from allocator.contract.channel_blocks import ChannelBlocks, parent_of, piece_of
from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.packing import dequantize
from allocator.contract.safetensors_file import read_folder_headers

__all__ = ["load_dequantized"]


def load_dequantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a gamma checkpoint, weights dequantized in float32 and then cast to `dtype`.

    Raises ContractError when the folder is not what it declares.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    declared, _manifest = check_checkpoint(folder)
    stored = read_folder_headers(folder)
    config = open_config(folder)
    del config.quantization_config
    state = {}
    for name, module in declared.modules.items():
        if not module.quantized:
            continue
        parts = {p: read_tensor(t) for p in _PARTS if (t := stored.pop(f"{name}.{p}", None)) is not None}
        state[f"{name}.weight"] = dequantize(
            parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point"), module.num_bits
        ).to(dtype)
    state |= {name: read_tensor(tensor).to(dtype) for name, tensor in stored.items()}
    if declared.channel_blocks is not None:
        state = joined_pieces(state, declared.channel_blocks)
    # Through transformers' own loading: a checkpoint has names of its own, and experts one by one.
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, told = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    missing, unexpected = told["missing_keys"], told["unexpected_keys"]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"{folder}: transformers wants {sorted(missing)} and does not know {sorted(unexpected)}")
    return model.eval().requires_grad_(False)


def joined_pieces(weights: dict[str, torch.Tensor], layout: ChannelBlocks) -> dict[str, torch.Tensor]:
    """`weights`, by tensor name, with the pieces of a module as one `[N, K]`, rows in the order of the layout."""
    whole: dict[str, torch.Tensor] = {}
    for tensor_name, weight in weights.items():
        name, _, kind = tensor_name.rpartition(".")
        piece = piece_of(name)
        if piece is None:
            whole[tensor_name] = weight
            continue
        rows, columns = weight.shape
        of_parent = f"{parent_of(name)}.{kind}"
        if of_parent not in whole:
            whole[of_parent] = weight.new_empty(rows * layout.blocks, columns)
        whole[of_parent][layout.channels(piece[1], rows)] = weight
    return whole


_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
