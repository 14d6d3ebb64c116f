"""What tests let one process and several ranks do alike: make a learner, train it, and tell what came out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.batch.packing import pack
from skyrl_train.batch.steps import steps
from skyrl_train.config import LoraConfig, TrainerConfig
from skyrl_train.learner.fsdp import sharded_learner
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.lora import BaseUnderAdapters, add_adapters
from skyrl_train.policy.model import Policy
from skyrl_train.policy.value_head import Critic
from skyrl_train.types import Batch
from skyrl_train.weights.shared_memory import SharedWeights
from tests.skyrl_train.batches import random_batch, shared_batch, uneven_batch
from tests.skyrl_train.learner.test_learner import trainer_config
from tests.skyrl_train.learner.test_step_wise import episodes
from tests.tiny_models import tiny_policy, tiny_tokenizer

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A learner and what it trains on, as plain data: every process makes its own."""

    algorithm: dict[str, Any] = field(default_factory=lambda: {"use_kl_loss": False})
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: {"tie_word_embeddings": True})
    lora_rank: int = 0
    batches: tuple[str, ...] = ("random",)
    moves_reference: bool = False
    far_from_rollout: bool = False
    is_offloaded: bool = False
    critic: str = ""  # own: with a trunk of its own; shared: on the policy's hidden states
    num_imitated: int = 0  # steps of imitation before the updates

    @property
    def config(self) -> TrainerConfig:
        settings = {"train_batch_size": 5, "policy_mini_batch_size": 5, "max_tokens_per_microbatch": 40}
        return trainer_config(self.algorithm, self.optimizer, **(settings | self.trainer))


@dataclass(frozen=True)
class Outcome:
    """Whole tensors of a training: of each optimizer step of the policy the gradients, then the weights.

    The weights of a critic are among them.
    """

    metrics: dict[str, float]
    gradients: list[Named]
    weights: Named
    batch: Batch


def learner_of(case: Case, *, is_sharded: bool, seed: int = 0) -> TorchLearner:
    """Return the learner of one process, or this rank's of many. `seed`: of all weights that a checkpoint holds."""
    config, is_checkpointed = case.config, bool(case.trainer.get("gradient_checkpointing"))
    policy = tiny_policy(seed=0 if case.lora_rank else seed, gradient_checkpointing=is_checkpointed, **case.model)
    if case.lora_rank:
        add_adapters(policy, LoraConfig(rank=case.lora_rank), seed=seed + 1)
    reference = reference_of(case, policy, seed) if needs_reference(case) else None
    critic = critic_of(case, policy, seed) if case.critic else None
    if is_sharded:
        learner = sharded_learner(
            policy,
            config,
            num_training_steps=10,
            temperature=1.3,
            reference=reference,
            critic=critic,
            offload=case.is_offloaded,
        )
        assert isinstance(learner, TorchLearner)
        return learner
    return TorchLearner(policy, config, num_training_steps=10, temperature=1.3, reference=reference, critic=critic)


def needs_reference(case: Case) -> bool:
    distills = case.algorithm.get("advantage_estimator") == "distillation"
    return case.algorithm.get("use_kl_loss", True) or case.algorithm.get("use_kl_in_reward", False) or distills


def reference_of(case: Case, policy: Policy, seed: int) -> Policy:
    if case.lora_rank:
        return BaseUnderAdapters.of(policy)
    reference = tiny_policy(seed=seed, **case.model)
    with torch.no_grad():
        for parameter in reference.module.parameters():
            parameter *= 1.1  # near enough for k3 to stay below its bound
    reference.module.requires_grad_(False)
    return reference


def critic_of(case: Case, policy: Policy, seed: int) -> Critic:
    """Return a critic whose head is not zero, so that its trunk has a gradient."""
    critic = Critic.on(policy) if case.critic == "shared" else Critic.of(tiny_policy(seed=seed + 3, **case.model))
    with torch.no_grad():
        critic.head.weight.add_(torch.linspace(-0.3, 0.3, 32))
    return critic


def prepared(learner: TorchLearner, case: Case, batch: Batch) -> Batch:
    batch = learner.add_logprobs(batch)
    if case.far_from_rollout:  # clips and covariances act
        batch = replace(batch, old_logprobs=batch.rollout_logprobs)
    coefficient = 0.1 if case.algorithm.get("use_kl_in_reward") else None
    return add_advantages(batch, case.config.algorithm, coefficient)


def batch_of(name: str, seed: int = 0) -> Batch:
    match name:
        case "shared":
            return shared_batch(seed)
        case "uneven":
            return uneven_batch(seed)
        case "turns":  # step-wise: every turn of an episode is a row
            return pack([turn for sample in episodes(seed) for turn in steps(sample)])
    return random_batch(num_prompts=5, seed=seed)


def train(case: Case, is_sharded: bool) -> Outcome:
    learner = learner_of(case, is_sharded=is_sharded)
    gradients, metrics, batch = note_gradients(learner), {}, None
    imitated: dict[str, float] = {}
    for seed in range(case.num_imitated):
        imitated = learner.imitate(batch_of("random", seed))
    for seed, name in enumerate(case.batches):
        batch = prepared(learner, case, batch_of(name, seed))
        metrics = learner.update(batch)
        if case.moves_reference:
            learner.update_reference()
    assert batch is not None
    return Outcome(imitated | metrics, gradients, weights_of(learner), batch)


def note_gradients(learner: TorchLearner) -> list[Named]:
    """Return a list to which every optimizer step adds the whole gradients it uses."""
    noted, optimizer = [], learner._optimizer
    original = optimizer.step

    def step(*args: Any) -> Any:
        optimizer._take_gradients()
        rows = {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}
        noted.append(whole(rows, learner))
        return original(*args)

    vars(optimizer)["step"] = step
    return noted


def weights_of(learner: TorchLearner) -> Named:
    masters = dict(learner._optimizer.masters)
    if learner._critic is not None:
        masters |= {f"critic/{name}": master for name, master in learner._critic._optimizer.masters.items()}
    return whole({name: master.detach().clone() for name, master in masters.items()}, learner)


def whole(rows: Named, learner: TorchLearner) -> Named:
    if learner._ranks.size == 1:
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return {name: torch.cat([part[name] for part in parts]) for name in rows}


def distance(ours: Named, theirs: Named) -> float:
    """Return |ours - theirs| / |theirs| of all numbers together."""
    assert ours.keys() == theirs.keys()
    difference = sum(float(((ours[name] - theirs[name]).double() ** 2).sum()) for name in theirs)
    return (difference / sum(float((theirs[name].double() ** 2).sum()) for name in theirs)) ** 0.5


def save(case: Case, folder: Path) -> Outcome:
    """Train on 2 ranks or more, save, and train on."""
    learner = learner_of(case, is_sharded=True)
    learner.update(prepared(learner, case, batch_of("random")))
    learner.update_reference()
    learner.save(folder).result()
    return _trained_on(learner, case)


def resume(case: Case, folder: Path, is_sharded: bool, saved_again: Path | None = None) -> Outcome:
    """Make another learner, load, save what was loaded if asked, and train on."""
    learner = learner_of(case, is_sharded=is_sharded, seed=7)
    learner.load(folder)
    if saved_again is not None:
        learner.save(saved_again).result()
    return _trained_on(learner, case)


def _trained_on(learner: TorchLearner, case: Case) -> Outcome:
    gradients = note_gradients(learner)
    batch = prepared(learner, case, batch_of("shared"))
    return Outcome(learner.update(batch), gradients, weights_of(learner), batch)


def hand_out(case: Case, saved: Path, folder: Path, is_sharded: bool) -> tuple[SharedWeights, list[float]]:
    """Load, publish and export. Returns what was published, and logprobs of some tokens."""
    learner = learner_of(case, is_sharded=is_sharded, seed=7)
    learner.load(saved)
    logprobs = learner.logprobs_of_tokens([5, 9, 2, 77, 120, 6])
    folder.mkdir(exist_ok=True)
    shared = learner.publish(folder / "weights")
    learner.save_pretrained(folder / "export", tiny_tokenizer())
    return shared, logprobs
