"""Configurations of published models: what their config.json says of sizes, and how many parameters they have."""

import json
from pathlib import Path
from typing import Any

from allocator.model import ModelShape, read_shape

FOLDER = Path(__file__).with_name("fixtures") / "configs"

PUBLISHED_PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-3-27b": 27_432_406_640,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "mistral-small-24b": 23_572_403_200,
    "mistral-small-3.2-24b": 24_011_361_280,
    "seed-oss-36b": 36_151_104_512,
    "olmo-3-32b": 32_233_522_176,
    "lfm2-1.2b": 1_170_340_608,
}
"""As the model's page shows them (the total of its safetensors headers; of gpt-oss-20b, whose experts are stored at 4
bits, the 20.91 billion of its model card)."""

COUNTED_PARAMETERS = PUBLISHED_PARAMETERS | {
    "gemma-4-31b": 31_273_088_876,
    "glm-4-32b": 32_566_081_536,
    "exaone-4-32b": 32_003_216_384,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-3-nano-30b-a3b": 31_577_940_288,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-27b": 27_356_728_560,
    "qwen3.5-35b-a3b": 35_107_181_936,
}
"""As the model class of transformers has them, with what it stores beside parameters. The publisher's figure of Gemma 4
was at hand as 31.3 billion, those of the next three were not. That of Nemotron 3 Nano is smaller by 2,944, the
corrections of its routers' scores; those of the last three are larger by the layer that predicts further tokens, which
transformers and vLLM leave out: 81,324,862,720, 27,781,427,952 and 35,951,822,704."""


def config_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def shape_of(name: str) -> ModelShape:
    return read_shape(config_of(name))
