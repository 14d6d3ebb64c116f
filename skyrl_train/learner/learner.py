"""The learner: a batch in, new weights out. It knows nothing of who calls it, nor where the samples came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.batch.packing import mini_batches, with_loss_weights
from skyrl_train.learner.gradient import Budget, accumulate_gradient, logprobs_of
from skyrl_train.learner.means import Means
from skyrl_train.learner.objective import Objective
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.policy.lora_files import save_merged
from skyrl_train.policy.model import Policy
from skyrl_train.spans import span
from skyrl_train.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.config import AlgorithmConfig, TrainerConfig

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether a reference policy must be loaded: only for a KL that has a weight."""
    return Objective(algorithm).needs_reference


class Learner:
    """Holds the policy's master weights, the optimizer and, if a KL term is on, a frozen reference policy.

    `num_training_steps`: calls of `update` in the whole run, for the schedule. `temperature`: of the sampling; all
    logprobs here are of softmax(logits / temperature), the reference's too. 0 (greedy) counts as 1, as in the engine.
    """

    def __init__(
        self,
        policy: Policy,
        trainer: TrainerConfig,
        *,
        num_training_steps: int,
        temperature: float = 1.0,
        reference: Policy | None = None,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.objective = Objective(trainer.algorithm)
        if self.objective.needs_reference and reference is None:
            raise ValueError("a KL term is on, so the learner needs a reference policy (or set use_kl_loss=false)")
        self.policy_version = 0  # optimizer steps so far
        self._trainer = trainer
        self._temperature = temperature or 1.0
        steps_per_update = math.ceil(trainer.train_batch_size / trainer.policy_mini_batch_size)
        self._optimizer = MasterOptimizer(
            policy.module.named_parameters(),
            trainer.policy.optimizer_config,
            num_training_steps * steps_per_update * trainer.update_epochs_per_batch,
        )

    def add_logprobs(self, batch: Batch) -> Batch:
        """The batch with what the coming update compares with: `old_logprobs` and `ref_logprobs`.

        `old_logprobs` stays None when nobody needs it before the update and the update is a single optimizer step: then
        the policy does not move before it is used, and the update's own logprobs are the old ones.
        """
        needs_old = (
            self._num_steps(batch) > 1 or self._trainer.algorithm.use_kl_in_reward or self.objective.rejects_samples
        )
        old_logprobs = self._logprobs(self.policy, batch) if needs_old else None
        ref_logprobs = None
        if self.reference is not None and self.objective.needs_reference:
            ref_logprobs = self._logprobs(self.reference, batch)
        return replace(batch, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)

    def update(self, batch: Batch, on_progress: Progress | None = None) -> dict[str, float]:
        """Train on the batch: epochs x mini batches, one optimizer step each. Metrics have SkyRL's names."""
        if batch.advantages is None:
            raise ValueError("the batch has no advantages: call add_advantages first")
        if batch.old_logprobs is None and self._num_steps(batch) > 1:
            raise ValueError(f"{self._num_steps(batch)} optimizer steps need old_logprobs: call add_logprobs first")
        means = Means()
        means.add({"response_length": _mean_response_length(batch)}, 1)
        batch, metrics = self.objective.without_rejected(batch)
        means.add(metrics, 1)
        trained = [
            with_loss_weights(step, self._trainer.algorithm.loss_reduction, self._trainer.algorithm.max_seq_len)
            for step in mini_batches(batch, self._trainer.policy_mini_batch_size)
            if step.loss_mask.any()  # else every sample was filtered out: not even weight decay may move the policy
        ]
        steps = [_trained_samples(step) for step in trained] * self._trainer.update_epochs_per_batch
        progress = _Progress(on_progress, sum(step.num_tokens for step in steps))
        num_skipped = 0
        for i, step in enumerate(steps):
            logprobs = self._accumulate_gradient(step, means, progress)
            if i < len(trained):  # in the first epoch
                old_logprobs = logprobs if step.old_logprobs is None else step.old_logprobs
                means.add(self.objective.drift_metrics(step, old_logprobs), int(step.loss_mask.sum()))
                for metrics, num_tokens in self.objective.drift_by_turn(step, old_logprobs):
                    means.add(metrics, num_tokens)
            num_skipped += self._step(means)
        means.add({"num_skipped_steps": float(num_skipped), "policy_version": float(self.policy_version)}, 1)
        return {f"policy/{name}": value for name, value in means.result().items()}

    def update_reference(self) -> None:
        """The policy as it is now becomes the reference."""
        if self.reference is None:
            return
        with torch.no_grad():
            ours = self.policy.weights
            for name, weight in self.reference.weights.items():
                weight.copy_(ours[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as live tensors and plain numbers: save it before training on."""
        state: dict[str, Any] = {"optimizer": self._optimizer.state_dict(), "policy_version": self.policy_version}
        if self._trainer.update_ref_every_epoch and self.reference is not None:
            state["reference"] = {name: weight.detach() for name, weight in self.reference.weights.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self.policy_version = state["policy_version"]
        if self.reference is not None and "reference" in state:
            for name, weight in self.reference.weights.items():
                weight.copy_(state["reference"][name])

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The policy in Hugging Face format (safetensors, config, tokenizer, chat template), as the engine sees it."""
        save_merged(self.policy.module, folder)
        tokenizer.save_pretrained(folder)

    def _num_steps(self, batch: Batch) -> int:
        """Optimizer steps of one update."""
        num_mini_batches = len(mini_batches(batch, self._trainer.policy_mini_batch_size))
        return num_mini_batches * self._trainer.update_epochs_per_batch

    def _logprobs(self, policy: Policy, batch: Batch) -> Tensor:
        budget = Budget(self._trainer.token_budget, self._trainer.micro_forward_batch_size_per_gpu)
        return logprobs_of(policy, batch, temperature=self._temperature, budget=budget)

    def _accumulate_gradient(self, mini_batch: Batch, means: Means, progress: _Progress) -> Tensor:
        self._optimizer.zero_grad()
        seed = (self._trainer.seed * 1_000_003 + self.policy_version) % 2**63
        return accumulate_gradient(
            self.policy,
            self.objective,
            mini_batch,
            temperature=self._temperature,
            budget=Budget(self._trainer.token_budget, self._trainer.micro_train_batch_size_per_gpu),
            generator=torch.Generator().manual_seed(seed),
            means=means,
            on_tokens=progress.advance,
        )

    def _step(self, means: Means) -> bool:
        """One optimizer step with the accumulated gradient. True: it was not finite, and nothing changed."""
        with span("optimizer step"):
            step = self._optimizer.step()
        means.add({"policy_lr": step.learning_rate}, 1)
        if not step.was_skipped:
            self.policy_version += 1
            means.add({"grad_norm": step.grad_norm}, 1)
        return step.was_skipped


class _Progress:
    """Counts tokens and tells whoever listens."""

    def __init__(self, listener: Progress | None, total: int) -> None:
        self._listener, self._total, self._done = listener, total, 0

    def advance(self, num_tokens: int) -> None:
        self._done += num_tokens
        if self._listener is not None:
            self._listener(self._done, self._total)


def _trained_samples(batch: Batch) -> Batch:
    """Without the samples that have no trained token: they would cost a forward pass and change nothing."""
    has_tokens = torch.zeros(batch.num_samples, dtype=torch.bool)
    has_tokens[batch.sample_index[batch.loss_mask]] = True
    return batch if has_tokens.all() else batch.select(torch.nonzero(has_tokens).flatten().tolist())


def _mean_response_length(batch: Batch) -> float:
    """Tokens of a sample from its first sampled token on, observations included; the mean over the samples."""
    position = torch.where(batch.loss_mask, batch.position_ids, batch.num_tokens)
    first = torch.full_like(batch.lengths, batch.num_tokens).scatter_reduce(0, batch.sample_index, position, "amin")
    return float((batch.lengths - first).clamp(min=0).double().mean())
