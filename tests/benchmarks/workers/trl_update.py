"""TRL: its training step on given samples instead of generated ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.config import AlgorithmConfig
from tests.benchmarks.workers.prompts import conversations
from tests.benchmarks.workers.samples import batch
from tests.benchmarks.workers.trl import GRPOTrainer, InTurns, make_trainer
from tests.benchmarks.workers.turns import NoMoreTurns, settings


class GivenSamples(GRPOTrainer):
    """Trainer on `samples`, the tensors that generation and rewards would have returned."""

    samples: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.accelerator.device) for name, tensor in self.samples.items()}


def padded_samples(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the samples in TRL's layout, a row each. All prompts and all responses have one length: no padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(asked["model"])
    ready = add_advantages(batch(tokenizer, asked), AlgorithmConfig())
    assert ready.advantages is not None
    num_samples, width = ready.num_samples, asked["prompt_tokens"]
    ids = ready.input_ids.view(num_samples, -1)
    completion = ids[:, width:]
    return {
        "prompt_ids": ids[:, :width],
        "prompt_mask": torch.ones_like(ids[:, :width]),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": ready.advantages.view(num_samples, -1)[:, -1],
        "num_items_in_batch": torch.tensor(completion.numel()),
    }


def main() -> None:
    asked = settings()
    tokenizer: Any = AutoTokenizer.from_pretrained(asked["model"])
    rows = [{"prompt": messages} for messages in conversations(tokenizer, asked["num_prompts"], asked["prompt_tokens"])]
    trainer = make_trainer(asked, rows, lambda completions, **_: [0.0] * len(completions), GivenSamples)
    trainer.samples = padded_samples(asked)
    trainer.add_callback(InTurns(lambda logs: {"grad_norm": float(logs["grad_norm"])}))
    try:
        trainer.train()
    except NoMoreTurns:
        return


if __name__ == "__main__":
    main()
