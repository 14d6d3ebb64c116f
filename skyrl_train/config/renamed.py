"""Keys of the newest SkyRL that stand in another section here: generator.inference_engine.* lies in generator."""

from __future__ import annotations

from dataclasses import fields

from skyrl_train.config.generator import GeneratorConfig
from skyrl_train.config.refused import rows_below

SECTION = "generator.inference_engine"
OTHER_NAMES = {
    "num_engines": "num_inference_engines",
    "tensor_parallel_size": "inference_engine_tensor_parallel_size",
    "pipeline_parallel_size": "inference_engine_pipeline_parallel_size",
    "expert_parallel_size": "inference_engine_expert_parallel_size",
    "data_parallel_size": "inference_engine_data_parallel_size",
    "remote_urls": "remote_inference_engine_urls",
}
KNOWN = {field.name for field in fields(GeneratorConfig)} | {key.partition(".")[2] for key in rows_below("generator")}


def renamed(key: str) -> str:
    """Return the key of this tree that means the same, or the key itself if there is none.

    generator.inference_engine.num_engines -> generator.num_inference_engines
    """
    section, _, rest = key.partition(f"{SECTION}.")
    if section or not rest:
        return key
    name, dot, below = rest.partition(".")
    name = OTHER_NAMES.get(name, name)
    return f"generator.{name}{dot}{below}" if name in KNOWN else key
