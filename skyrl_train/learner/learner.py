"""The learner in this process, on one device: a batch in, new weights out. It does not know who calls it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.batch.packing import mini_batches, pack, with_loss_weights
from skyrl_train.learner.base import OnTokens
from skyrl_train.learner.critic import CriticLearner, with_values
from skyrl_train.learner.gradient import accumulate_gradient, logprobs_of
from skyrl_train.learner.imitation import imitate
from skyrl_train.learner.lost_gradient import refuse_if_lost
from skyrl_train.learner.objective import Objective
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.learner.passes import Budget
from skyrl_train.learner.ranks import ONE_PROCESS, Ranks
from skyrl_train.learner.saved import Part, SavedLearner, ToSave, Writer
from skyrl_train.learner.weighted_metrics import WeightedMetrics
from skyrl_train.policy.lora import merged_weights
from skyrl_train.policy.model import Policy
from skyrl_train.policy.value_head import Critic
from skyrl_train.spans import span
from skyrl_train.types import Batch, Sample
from skyrl_train.weights.broadcast import TIMEOUT_S, Broadcast, Sender
from skyrl_train.weights.buckets import size_of, spec_of
from skyrl_train.weights.ipc import Handles, IpcSender, key_of
from skyrl_train.weights.shared_memory import SharedTensor, SharedWeights, write_shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.config import AlgorithmConfig, TrainerConfig


class Stepped(Enum):
    """The outcome of an optimizer step. Only YES changes the weights, the moments and the schedule."""

    YES = auto()
    NOT_FINITE = auto()
    NO_ADVANTAGE = auto()


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Return whether a reference policy must be loaded: only for a KL that has a weight."""
    return Objective(algorithm).needs_reference


class TorchLearner:
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
        critic: Critic | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.objective = Objective(trainer.algorithm)
        if self.objective.needs_reference and reference is None:
            raise ValueError(
                "a KL term or a teacher is on, so the learner needs a reference policy (or set use_kl_loss=false)"
            )
        self.policy_version = 0  # optimizer steps so far
        self._imitated = False  # whether the optimizer's moments are those of imitation
        self._trainer = trainer
        self._temperature = temperature or 1.0
        self._ranks = ranks
        self._writer = Writer()
        self._sender: Sender | None = None  # of rank 0
        self._ipc_sender: IpcSender | None = None
        self._specs: list[SharedTensor] = []  # of the weights that are sent
        steps_per_update = math.ceil(trainer.train_batch_size / trainer.policy_mini_batch_size)
        self._optimizer = MasterOptimizer(
            policy.module.named_parameters(),
            trainer.policy.optimizer_config,
            num_training_steps * steps_per_update * trainer.update_epochs_per_batch,
            ranks,
        )
        self._critic: CriticLearner | None = None
        if critic is not None:
            self._critic = CriticLearner(critic, trainer, num_training_steps=num_training_steps, ranks=ranks)

    def add_logprobs(self, batch: Batch) -> Batch:
        """Return the batch with what the coming update compares with: `old_logprobs`, `ref_logprobs`, `values`.

        `old_logprobs` stays None when nobody needs it before the update and the update is a single optimizer step: then
        the policy does not move before it is used, and the update's own logprobs are the old ones.
        """
        self._writer.wait()  # adapters change places with the reference's
        algorithm = self._trainer.algorithm
        is_compared = algorithm.use_kl_in_reward or algorithm.distills or self.objective.rejects_samples
        needs_old = is_compared or self._num_steps(batch) > 1
        old_logprobs = self._logprobs(self.policy, batch) if needs_old else None
        ref_logprobs = None
        if self.reference is not None and self.objective.needs_reference:
            ref_logprobs = self._logprobs(self.reference, batch)
        return with_values(replace(batch, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs), self._critic)

    def update(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        """Train on the batch: epochs x mini batches, one optimizer step each. Metrics have SkyRL's names."""
        if batch.advantages is None:
            raise ValueError("the batch has no advantages: call add_advantages first")
        if batch.old_logprobs is None and self._num_steps(batch) > 1:
            raise ValueError(f"{self._num_steps(batch)} optimizer steps need old_logprobs: call add_logprobs first")
        self._writer.wait()
        if self._imitated:  # moments of another loss say nothing about this one
            self._optimizer.forget_moments()
            self._imitated = False
        measured = [WeightedMetrics.of({"response_length": _mean_response_length(batch)}, 1)]
        whole, (batch, metrics) = batch, self.objective.without_rejected(batch)
        measured.append(WeightedMetrics.of(metrics, 1))
        first_epoch = self._weighed_mini_batches(batch)
        steps = first_epoch * self._trainer.update_epochs_per_batch
        critic_steps = self._critic.mini_batches(whole) if self._critic else []
        progress = _Progress(on_tokens, sum(step.num_tokens for step in [*steps, *critic_steps]))
        of_critic = self._critic.update(whole, critic_steps, progress.advance) if self._critic else {}
        outcomes: Counter[Stepped] = Counter()
        for i, mini_batch in enumerate(steps):
            logprobs, metrics_of_pass = self._accumulate_gradient(mini_batch, progress.advance)
            measured.append(metrics_of_pass)
            if i < len(first_epoch):
                measured.append(self._drift(mini_batch, logprobs))
            outcome, metrics_of_step = self._step(mini_batch, logprobs)
            outcomes[outcome] += 1
            measured.append(metrics_of_step)
        counts = {
            "num_skipped_steps": float(outcomes[Stepped.NOT_FINITE]),
            "num_steps_without_advantage": float(outcomes[Stepped.NO_ADVANTAGE]),
            "policy_version": float(self.policy_version),
        }
        means = WeightedMetrics.merged(*measured, WeightedMetrics.of(counts, 1)).means()
        return {f"policy/{name}": value for name, value in means.items()} | of_critic

    def imitate(self, batch: Batch, on_tokens: OnTokens | None = None) -> dict[str, float]:
        """Make one optimizer step on conversations, with the rate of trainer.sft (see imitation.py)."""
        self._writer.wait()
        progress = _Progress(on_tokens, batch.num_tokens)
        metrics = imitate(
            self.policy, self._optimizer, self._trainer, batch, progress.advance, self._generator(), self._ranks
        )
        self._imitated = True
        self.policy_version += not metrics["sft/num_skipped_steps"]
        return metrics

    def update_reference(self) -> None:
        """Make the policy as it is now the reference."""
        if self.reference is None:
            return
        self._writer.wait()
        with torch.no_grad():
            ours = self.policy.weights
            for name, weight in self.reference.weights.items():
                self._ranks.local(weight).copy_(self._ranks.computed(ours[name]))

    def save(self, folder: Path) -> Future[None]:
        """Begin to write all that the next update depends on: masters, moments, schedule, a reference that moves.

        The critic's are written after the policy's, by the same thread.
        """
        optimizer = self._optimizer.plain_state()
        plain = {"policy_version": self.policy_version, "optimizer": optimizer, "imitated": self._imitated}
        files = [ToSave(folder, self._optimizer.parts() | self._reference_parts(), plain)]
        if self._critic is not None:
            files.append(self._critic.to_save(folder))
        return self._writer.begin(files, self._ranks)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        self._writer.wait()
        saved = SavedLearner(folder)
        self._optimizer.load(saved)
        if self._critic is not None:
            self._critic.load(folder)
        self.policy_version = saved.plain["policy_version"]
        self._imitated = saved.plain.get("imitated", False)
        for name, part in self._reference_parts().items():
            if name in saved.shapes:
                part.rows.copy_(saved.part(name, self._ranks))

    def publish(self, path: Path) -> SharedWeights:
        """Write the weights for engines of other processes, see `Learner`."""
        weights = merged_weights(self.policy.module, self._ranks.whole)
        written: SharedWeights | OSError | None = None
        if self._ranks.rank == 0:
            try:
                written = write_shared(weights, path, self.policy_version)
            except OSError as error:
                written = error
        for _ in weights:
            pass  # each is gathered from all ranks, whatever becomes of it on rank 0
        written = self._ranks.gathered(written)[0]
        if not isinstance(written, SharedWeights):
            raise written or OSError(f"rank 0 wrote nothing into {path}")
        return written

    def announce_weights(self, address: str = "127.0.0.1", num_readers: int = 0) -> Broadcast:
        """Open the meeting point, see `Learner`. The first call gathers every weight once to see its type and shape."""
        if not self._specs:
            self._specs = [spec_of(*named) for named in merged_weights(self.policy.module, self._ranks.whole)]
        broadcast: Broadcast | OSError | None = None
        if self._ranks.rank == 0:
            try:
                self._sender = self._sender or Sender(address, self.policy.device)
                broadcast = self._sender.announce(self._specs, self.policy_version)
            except OSError as error:
                broadcast = error
        broadcast = self._ranks.gathered(broadcast)[0]
        if not isinstance(broadcast, Broadcast):
            raise broadcast or OSError("rank 0 announced nothing")
        return self._with_handles(broadcast, num_readers) if num_readers else broadcast

    def _with_handles(self, broadcast: Broadcast, num_readers: int) -> Broadcast:
        """Lend buffers to the engines on each device. Of ranks on one device, as on a CPU, the first one lends."""
        devices = self._ranks.gathered(key_of(self.policy.device))
        lent: dict[str, Handles] | Exception = {}
        try:
            if devices.index(key_of(self.policy.device)) == self._ranks.rank:
                self._ipc_sender = self._ipc_sender or IpcSender(self.policy.device, TIMEOUT_S)
                lent = self._ipc_sender.lend(max(map(size_of, broadcast.buckets)), num_readers)
        except (RuntimeError, OSError) as error:
            lent = error
        handles: dict[str, Handles] = {}
        for of_rank in self._ranks.gathered(lent):
            if isinstance(of_rank, Exception):
                raise of_rank
            handles |= of_rank
        return replace(broadcast, handles=handles)

    def send_weights(self, broadcast: Broadcast, num_engines: int) -> list[str]:
        """Send the weights to engines, see `Learner`."""
        weights = merged_weights(self.policy.module, self._ranks.whole)
        outcome: list[str] | Exception = []
        try:
            if self._ipc_sender is not None and self._ipc_sender.is_of(broadcast):
                outcome = self._ipc_sender.send(weights, broadcast)
            elif self._sender is not None and not broadcast.handles:
                outcome = self._sender.send(weights, broadcast, num_engines)
        except (RuntimeError, OSError, ValueError) as error:
            outcome = error
        for _ in weights:
            pass  # each is gathered from all ranks, whatever becomes of it on this one
        outcomes = self._ranks.gathered(outcome)
        engines = {engine for outcome in outcomes if isinstance(outcome, list) for engine in outcome}
        if not engines:
            errors = (outcome for outcome in outcomes if isinstance(outcome, Exception))
            raise next(errors, RuntimeError("no rank has announced these weights"))
        return sorted(engines)

    def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        """Return the logprobs of ids[1:] at temperature 1."""
        if len(ids) < 2:
            raise ValueError(f"{len(ids)} token ids: the first one has nothing before it, so at least two are needed")
        batch = pack([_sampled_after_the_first(ids)])
        return self._logprobs(self.policy, batch, temperature=1.0)[1:].tolist()

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy in Hugging Face format (safetensors, config, tokenizer, chat template), adapters merged."""
        self._ranks.save_merged(self.policy, folder)
        if self._ranks.rank == 0:
            tokenizer.save_pretrained(folder)

    def close(self) -> None:
        """Free the gradients and the optimizer. The policy stays for whoever else holds it."""
        self._writer.close()
        self._optimizer.zero_grad()
        del self._optimizer
        if self._critic is not None:
            self._critic.close()

    def _num_steps(self, batch: Batch) -> int:
        """Return the number of optimizer steps of one update."""
        num_mini_batches = len(mini_batches(batch, self._trainer.policy_mini_batch_size))
        return num_mini_batches * self._trainer.update_epochs_per_batch

    def _weighed_mini_batches(self, batch: Batch) -> list[Batch]:
        """Return the mini batches with loss_weights, without samples and mini batches that have no trained token.

        Where every sample was filtered out there is no mini batch: not even weight decay may move the policy.
        """
        trainer = self._trainer
        weighed = [
            with_loss_weights(mini_batch, trainer.algorithm.loss_reduction, trainer.algorithm.max_seq_len)
            for mini_batch in mini_batches(batch, trainer.policy_mini_batch_size)
            if mini_batch.loss_mask.any()
        ]
        return [_trained_samples(mini_batch) for mini_batch in weighed]

    def _logprobs(self, policy: Policy, batch: Batch, temperature: float | None = None) -> Tensor:
        budget = Budget(self._trainer.token_budget, self._trainer.micro_forward_batch_size_per_gpu)
        temperature = temperature or self._temperature
        return logprobs_of(policy, batch, temperature=temperature, budget=budget, ranks=self._ranks)

    def _reference_parts(self) -> dict[str, Part]:
        """Return this rank's rows of a reference that does not stay as it was loaded."""
        if self.reference is None or not self._trainer.reference_moves:
            return {}
        weights = self.reference.weights
        return {f"reference/{name}": Part(self._ranks.local(w), tuple(w.shape)) for name, w in weights.items()}

    def _accumulate_gradient(
        self, mini_batch: Batch, on_tokens: Callable[[int], None]
    ) -> tuple[Tensor, WeightedMetrics]:
        self._optimizer.zero_grad()
        return accumulate_gradient(
            self.policy,
            self.objective,
            mini_batch,
            temperature=self._temperature,
            budget=Budget(self._trainer.token_budget, self._trainer.micro_train_batch_size_per_gpu),
            generator=self._generator(),
            on_tokens=on_tokens,
            ranks=self._ranks,
        )

    def _generator(self) -> torch.Generator:
        """Return the random numbers of the coming optimizer step, the same ones however often it is asked."""
        return torch.Generator().manual_seed((self._trainer.seed * 1_000_003 + self.policy_version) % 2**63)

    def _drift(self, mini_batch: Batch, logprobs: Tensor) -> WeightedMetrics:
        """Measure how far the learner was from the engine before the update. logprobs: of the first epoch's pass."""
        old_logprobs = logprobs if mini_batch.old_logprobs is None else mini_batch.old_logprobs
        drift = self.objective.drift_metrics(mini_batch, old_logprobs)
        by_turn = self.objective.drift_by_turn(mini_batch, old_logprobs)
        return WeightedMetrics.merged(
            WeightedMetrics.of(drift, int(mini_batch.loss_mask.sum())),
            *(WeightedMetrics.of(metrics, num_tokens) for metrics, num_tokens in by_turn),
        )

    def _step(self, mini_batch: Batch, logprobs: Tensor) -> tuple[Stepped, WeightedMetrics]:
        """Make one optimizer step with the accumulated gradient, unless it must not be made."""
        metrics = {"policy_lr": self._optimizer.learning_rate}
        if self._has_nothing_to_learn(mini_batch):
            self._optimizer.zero_grad()
            return Stepped.NO_ADVANTAGE, WeightedMetrics.of(metrics, 1)
        with span("optimizer step"):
            step = self._optimizer.step()
        if step.was_skipped:
            return Stepped.NOT_FINITE, WeightedMetrics.of(metrics, 1)
        if step.grad_norm == 0:
            refuse_if_lost(self.objective, mini_batch, logprobs, self._generator())
        self.policy_version += 1
        return Stepped.YES, WeightedMetrics.of({**metrics, "grad_norm": step.grad_norm}, 1)

    def _has_nothing_to_learn(self, mini_batch: Batch) -> bool:
        """Return whether a step would only move the policy by the optimizer's momentum and by weight decay.

        So it is where every advantage is zero and neither the KL nor the entropy has a weight. A loss may have terms
        without an advantage (kl_cov has one, a user's may): then its gradient is not zero, and the step is made.
        """
        if self.objective.is_regularized or mini_batch.advantages is None:
            return False
        return not mini_batch.advantages[mini_batch.loss_mask].any() and not self._optimizer.has_gradient()


class _Progress:
    """Counts tokens and tells whoever listens."""

    def __init__(self, listener: OnTokens | None, total: int) -> None:
        self._listener, self._total, self._done = listener, total, 0

    def advance(self, num_tokens: int) -> None:
        self._done += num_tokens
        if self._listener is not None:
            self._listener(self._done, self._total)


def _sampled_after_the_first(ids: list[int]) -> Sample:
    count, zeros = len(ids), [0.0] * len(ids)
    return Sample(ids, [False] + [True] * (count - 1), zeros, zeros, num_prompt_tokens=1, group_id="", trajectory_id="")


def _trained_samples(batch: Batch) -> Batch:
    """Return the batch without samples that have no trained token: they would cost a pass and change nothing."""
    has_tokens = torch.zeros(batch.num_samples, dtype=torch.bool)
    has_tokens[batch.sample_index[batch.loss_mask]] = True
    return batch if has_tokens.all() else batch.select(torch.nonzero(has_tokens).flatten().tolist())


def _mean_response_length(batch: Batch) -> float:
    """Return the mean over samples of their tokens from the first sampled one on, observations included."""
    position = torch.where(batch.loss_mask, batch.position_ids, batch.num_tokens)
    first = torch.full_like(batch.lengths, batch.num_tokens).scatter_reduce(0, batch.sample_index, position, "amin")
    return float((batch.lengths - first).clamp(min=0).double().mean())
