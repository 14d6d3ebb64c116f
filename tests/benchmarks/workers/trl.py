"""TRL's GRPOTrainer with our settings, in its fastest configuration on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # ty: ignore[import-not-found]

from tests.benchmarks.workers.turns import Turns

Rows = list[dict[str, Any]]
Reward = Callable[..., list[float]]


def make_trainer(
    settings: dict[str, Any], rows: Rows, reward: Reward, kind: type[GRPOTrainer], *, exact_length: bool = True
) -> GRPOTrainer:
    """Return TRL's trainer: one optimizer step on all samples of a step, `rows` in a pass. `dtype`: of the weights.

    In bfloat16 the optimizer's moments are bfloat16, too, and small updates of large weights are lost; float32 computes
    in bfloat16 through autocast, but samples in float32.
    """
    from datasets import Dataset

    tokens = settings["tokens"]
    config = GRPOConfig(
        output_dir=settings["folder"],
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        model_init_kwargs={"dtype": settings["dtype"]},
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=settings["num_prompts"] * settings["samples"] // settings["rows"],
        num_generations=settings["samples"],
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens} if exact_length else None,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        beta=0.0,
        max_steps=10**6,
        seed=settings.get("seed", 42),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = kind(settings["model"], reward, config, Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    return trainer


class TimedGeneration(GRPOTrainer):
    """A trainer that keeps how long the last generation took."""

    generate_s = 0.0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.generate_s = time.perf_counter() - began


class InTurns(TrainerCallback):
    """Callback that runs one training step (generation, rewards, loss, backward, optimizer) per request."""

    def __init__(self, facts: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._turns, self._facts = Turns(), facts

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._turns.end()

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs is not None and "grad_norm" in logs:
            self._turns.tell(self._facts(logs))
