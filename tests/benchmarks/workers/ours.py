"""Ours, built as in a training run: an experiment from a configuration, with heavy work in its thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from skyrl_train import compute
from skyrl_train.config import SkyRLConfig, load_config
from skyrl_train.entrypoints.main_base import BasePPOExp
from tests.benchmarks.workers.prompts import conversations

Experiment = TypeVar("Experiment", bound=BasePPOExp)

# What run_openenv.sh chooses for a small model on a CPU, without evaluation and checkpoints.
RECIPE = (
    "trainer.policy.optimizer_config.lr=1e-5",
    "trainer.algorithm.use_kl_loss=false",
    "trainer.gradient_checkpointing=false",
    "trainer.eval_interval=-1",
    "trainer.eval_before_train=false",
    "trainer.ckpt_interval=-1",
    "generator.max_input_length=4096",
    "trainer.max_prompt_length=4096",
)


def configuration(settings: dict[str, Any], env_class: str, *overrides: str) -> SkyRLConfig:
    """Return a configuration of one optimizer step: prompts of the given number and length, `samples` episodes each."""
    from skyrl_train.policy.model_files import load_tokenizer

    folder = Path(settings["folder"])
    rows = conversations(load_tokenizer(settings["model"]), settings["num_prompts"], settings["prompt_tokens"])
    data = folder / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": messages, "env_class": env_class}) for messages in rows))
    return load_config(
        [
            *RECIPE,
            f"data.train_data=['{data}']",
            f"trainer.policy.model.path={settings['model']}",
            f"trainer.ckpt_path={folder / 'run'}",
            f"trainer.export_path={folder / 'exports'}",
            f"trainer.train_batch_size={settings['num_prompts']}",
            f"trainer.policy_mini_batch_size={settings['num_prompts']}",
            f"trainer.max_tokens_per_microbatch={settings['token_budget']}",
            f"generator.n_samples_per_prompt={settings['samples']}",
            f"generator.sampling_params.max_generate_length={settings['tokens']}",
            f"generator.sampling_params.min_tokens={settings['tokens']}",
            *overrides,
        ]
    )


def in_compute_thread(call: Any, *args: Any) -> Any:
    return compute.submit(call, *args).result()
