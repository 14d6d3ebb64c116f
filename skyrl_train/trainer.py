"""The loop. One step is the walk of a prompt: episodes, samples, a batch, advantages, an update, new weights."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loguru import logger

from skyrl_train import compute
from skyrl_train.algorithms.advantages import add_advantages, advantage_metrics, group_metrics
from skyrl_train.algorithms.kl import KLController, kl_metrics
from skyrl_train.algorithms.multi_reward import NamedRewards, named_rewards
from skyrl_train.batch.dumped import dump_batch
from skyrl_train.batch.packing import pack
from skyrl_train.batch.samples import check_shaped, to_samples
from skyrl_train.callbacks import CallbackInput, numbers_of
from skyrl_train.config import SkyRLConfig
from skyrl_train.conversations import Conversations
from skyrl_train.engine.base import Engine
from skyrl_train.evaluate import Evaluator
from skyrl_train.files import naming, whole_folder
from skyrl_train.learner.base import Learner, LearnerDied
from skyrl_train.prompts import TrainPrompts
from skyrl_train.rollout.dynamic_sampling import DynamicSampling
from skyrl_train.rollout.filters import (
    mask_overlong,
    overlong_metrics,
    with_overlong_penalties,
    zero_reward_on_non_stop,
)
from skyrl_train.rollout.round import Round, RoundPlayer
from skyrl_train.rollout.sampling import sampling_params
from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.run.checkpoint import State, random_states, set_random_states
from skyrl_train.run.metrics import PHASES, rollout_metrics
from skyrl_train.run.run import Run, RunRefused
from skyrl_train.run.standstill import Standstill
from skyrl_train.spans import span
from skyrl_train.types import Batch, Group, Prompt, Sample
from skyrl_train.weights.base import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.ray_ppo_trainer import RayPPOTrainer

Metrics = dict[str, float]
T = TypeVar("T")


@dataclass
class Trainer:
    """Owns the order of things and nothing else; every part is given to it ready.

    `global_step` counts finished steps, so a checkpoint of step N goes on with step N + 1. The first steps imitate
    conversations, if there are any; those after them play prompts.
    """

    config: SkyRLConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: TrainPrompts
    evaluator: Evaluator | None
    collector: RoundPlayer
    engine: Engine
    learner: Learner
    weights: Weights
    run: Run
    kl_controller: KLController
    extra_metrics: Callable[[], Metrics] = dict  # an experiment's own, asked once a step
    conversations: Conversations | None = None  # to imitate before the first step of RL
    users: RayPPOTrainer | None = None  # the user's hook and callbacks, as SkyRL has them
    shape_rewards: Callable[[list[Group]], Any] | None = None  # the experiment's hook
    global_step: int = 0
    num_batches: int = 0  # of prompts, played so far: one a step, or more with dynamic sampling
    num_tokens: int = 0  # sampled for training, over the whole run
    timings: Metrics = field(default_factory=dict)
    saving: asyncio.Future[None] | None = None  # of a checkpoint that is not on the disk yet
    standstill: Standstill = field(default_factory=Standstill)

    @property
    def total_training_steps(self) -> int:
        return self.num_imitation_steps + self.prompts.schedule.num_steps

    @property
    def num_imitation_steps(self) -> int:
        return self.conversations.num_steps if self.conversations else 0

    @property
    def num_rl_steps(self) -> int:
        """Steps of RL that are finished; below 0 while conversations are left to imitate."""
        return self.global_step - self.num_imitation_steps

    async def train(self) -> None:
        """Train from wherever the run stands to its last step. Leaves nothing running, however it ends."""
        try:
            await self.restore()
            self._fire("on_train_start")
            if self.global_step == 0 and self.config.trainer.eval_before_train:
                with self.run.profile.step(0):
                    self.run.log(0, await self.evaluate())
            while self.global_step < self.total_training_steps:
                with self.run.profile.step(self.global_step + 1):
                    await self.recorded_step()
            await self._saved()
            self._fire("on_train_end")
        finally:
            await self.close()

    async def recorded_step(self) -> None:
        """Make a step, and whatever is due after it."""
        if self._begins_epoch():
            self._fire("on_epoch_start", step=self.global_step + 1)
        self._fire("on_step_start", step=self.global_step + 1)
        metrics = await self.timed_step()
        self._fire("on_step_end", metrics=metrics)
        if self._is_due(self.config.trainer.eval_interval) or (self.users and self.users.control.should_evaluate):
            metrics |= await self.evaluate()
        logs = metrics | self._clock()
        self._fire("on_log", logs=logs)
        self.run.log(self.global_step, numbers_of(logs, "the logs of on_log"))
        if self._ends_epoch():
            self._fire("on_epoch_end", metrics=metrics)
        await self.save()

    async def step(self) -> Metrics:
        """Walk once from prompts to new weights; `global_step` still counts the steps before it."""
        groups, measured = await self._play()  # prompt -> episode -> trajectory
        samples = self._to_samples(groups)  # -> sample
        if not samples:  # no episode sampled a token: the step counts, and there is nothing to update with
            return measured
        batch = pack(samples)  # -> batch
        measured |= {"generate/samples_per_episode": batch.num_samples / batch.num_trajectories}
        await self.weights.before_update(self.engine)
        batch = await self._learn("fwd_logprobs_values_reward", self.learner.add_logprobs, batch)
        with self._timed("compute_advantages_and_returns"):
            batch, kl_values = self._add_advantages(batch, self._named_rewards(samples, groups))
        self.run.keep_advantages(self.global_step + 1, samples, batch)
        if self.config.trainer.dump_data_batch:
            await asyncio.to_thread(dump_batch, batch, self.config.trainer.export_path, self.global_step + 1)
        self.run.progress.phase("update", batch.num_tokens, "tokens")
        metrics = await self._learn("policy_train", self.learner.update, batch, self.run.progress.reached)  # -> weights
        with self._timed("sync_weights"):
            await self.weights.push(self.learner, self.engine)
        distills = self.config.trainer.algorithm.distills
        return measured | advantage_metrics(batch, distills=distills) | kl_values | metrics | self.weights.metrics

    async def imitate(self) -> Metrics:
        """Make a step of the warm start: conversations -> batch -> cross entropy -> new weights."""
        assert self.conversations is not None
        batch = self.conversations.batch(self.global_step + 1)
        await self.weights.before_update(self.engine)
        self.run.progress.phase("imitation", batch.num_tokens, "tokens")
        metrics = await self._learn("policy_train", self.learner.imitate, batch, self.run.progress.reached)
        if self.num_rl_steps == -1 and self.config.trainer.reference_is_base:
            await asyncio.wrap_future(compute.submit(self.learner.update_reference))  # the KL is measured from here
        with self._timed("sync_weights"):
            await self.weights.push(self.learner, self.engine)
        return metrics | self.weights.metrics

    async def timed_step(self) -> Metrics:
        self.timings = {}
        with self._timed("step"):
            metrics = await (self.step() if self.num_rl_steps >= 0 else self.imitate())
        self.global_step += 1
        if warning := self.standstill.after(metrics):
            logger.warning(warning)
        metrics |= {"trainer/steps_without_learning": float(self.standstill.num_steps)}
        if self._ends_epoch() and self.config.trainer.update_ref_every_epoch:
            await asyncio.wrap_future(compute.submit(self.learner.update_reference))
        return metrics

    async def evaluate(self) -> Metrics:
        """Return the metrics of an evaluation; none without validation data."""
        if self.evaluator is None:
            return {}
        self._fire("on_eval_start")
        with self._timed("eval"):
            metrics = await self.evaluator.evaluate(self.global_step)
        self._fire("on_eval_end", metrics=metrics)
        return metrics

    async def save(self) -> None:
        """Begin a checkpoint and write an export, if this step is due for them. All records are on the disk before.

        The checkpoint is written while the next step runs. An error ends the run at the end of the step in which it
        came. A callback that listens to on_save waits for the checkpoint, and the next step waits for the callback.
        """
        trainer = self.config.trainer
        if self.saving is not None and self.saving.done():
            await self._saved()
        if self._is_due(trainer.ckpt_interval) or (self.users and self.users.control.should_save):
            is_awaited = self.users is not None and self.users.listens_to("on_save")
            with span("checkpoint"):
                await self._begin_saving()
                if is_awaited:
                    await self._saved()
            if is_awaited:
                self._fire("on_save", ckpt_path=str(self.run.checkpoints.path(self.global_step)))
        if self.users is not None:
            self.users.control.reset()
        if self._is_due(trainer.hf_save_interval):
            with span("export"):
                await asyncio.to_thread(self.export, Path(trainer.export_path) / f"global_step_{self.global_step}")

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format, whole or not at all."""
        with naming(folder / "policy"), whole_folder(folder / "policy") as unfinished:
            compute.submit(self.learner.save_pretrained, unfinished, self.tokenizer).result()

    def state(self) -> State:
        """Return all that later steps depend on, beside the learner and what follows from seed and step alone."""
        return {
            "trainer_state": {
                "global_step": self.global_step,
                "num_batches": self.num_batches,
                "num_tokens": self.num_tokens,
                "random": random_states(),
                "kl_controller": self.kl_controller.state_dict(),
            },
        }

    async def restore(self) -> None:
        """Take up the run where its checkpoint left it; at step 0 nothing is to be done."""
        start = self.run.start
        if start.learner is not None:
            saved = start.state["trainer_state"]
            try:
                await asyncio.wrap_future(compute.submit(self.learner.load, start.learner))
            except (KeyError, ValueError) as error:  # of another model or another optimizer
                raise RunRefused(f"the checkpoint of step {start.step} does not fit this run: {error}") from error
            self.kl_controller.load_state_dict(saved["kl_controller"])
            set_random_states(saved["random"])
            self.global_step, self.num_tokens = start.step, saved["num_tokens"]
            self.num_batches = saved.get("num_batches", start.step)
        await self.weights.push(self.learner, self.engine)

    async def close(self) -> None:
        try:
            self.collector.close()
            await self.engine.close()  # behind whatever the compute thread is still doing, an update included
        finally:
            try:
                await self._saved()
            except (OSError, LearnerDied) as error:  # what ended the run is raised, and not this
                logger.warning(f"the last checkpoint was not written: {error}")
            self.learner.close()

    async def _play(self) -> tuple[list[Group], Metrics]:
        """Return the groups to learn from, and the metrics of all that were played.

        They are those of one batch of prompts, or of as many as dynamic sampling needs.
        """
        trainer = self.config.trainer
        seed = derive_seed("dynamic sampling", trainer.seed, self.num_rl_steps + 1)
        rollout = DynamicSampling(trainer.algorithm.dynamic_sampling, self.prompts.schedule.batch_size, seed)
        played: list[Group] = []
        while not rollout.is_done:
            prompts = self.prompts.take(self.num_batches + 1)
            self.num_batches += 1
            groups = await self._collect([replace(prompt, uid=rollout.uid_of(prompt)) for prompt in prompts])
            played += (shaped := await self._shaped(groups))
            rollout.add(self._without_pay_for_cuts(shaped))
        groups, penalties = self._penalized(rollout.groups)
        return groups, rollout_metrics(played) | rollout.metrics() | penalties

    async def _begin_saving(self) -> None:
        """Let a thread write a checkpoint. Returns when it no longer matters to it what the next step changes."""
        await self._saved()
        loop, has_begun = asyncio.get_running_loop(), asyncio.Event()

        def save_learner(folder: Path) -> None:
            written = compute.submit(self.learner.save, folder).result()
            loop.call_soon_threadsafe(has_begun.set)
            written.result()

        writing = asyncio.to_thread(self.run.save_checkpoint, self.global_step, self.state(), save_learner)
        self.saving, begun = asyncio.ensure_future(writing), asyncio.ensure_future(has_begun.wait())
        try:
            await asyncio.wait((self.saving, begun), return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        if self.saving.done():
            await self._saved()

    async def _saved(self) -> None:
        """Wait until the last checkpoint is on the disk, and raise what has stopped it."""
        if (saving := self.saving) is None:
            return
        await asyncio.wait((saving,))  # whoever is cancelled here leaves it to `close`
        self.saving = None
        saving.result()

    async def _collect(self, prompts: list[Prompt]) -> list[Group]:
        generator, step = self.config.generator, self.global_step + 1
        this_round = Round(
            "train", step, prompts, generator.n_samples_per_prompt, sampling_params(generator.sampling_params)
        )
        on_episode = self.run.phase("rollout", this_round.num_episodes, "episodes")
        busy_before = self.engine.busy_seconds
        with self._timed("generate"):
            groups = await self.collector.collect(this_round, on_episode)
        self._add_time("timing/engine", self.engine.busy_seconds - busy_before)
        self.run.keep("train", step, groups)
        return groups

    async def _shaped(self, groups: list[Group]) -> list[Group]:
        """Call the user's hooks between episodes and batch; they must return the same episodes."""
        before = [trajectory.id for group in groups for trajectory in group.trajectories]
        if self.users is not None:
            groups = await self.users.shaped(groups)
        if self.shape_rewards is not None:
            answer = self.shape_rewards(groups)
            groups = await answer if inspect.isawaitable(answer) else answer
        check_shaped(groups, before)
        return groups

    def _fire(self, event: str, *, step: int | None = None, **fields: Any) -> None:
        """Call an event of the user's callbacks."""
        if self.users is None:
            return
        schedule, now = self.prompts.schedule, self.global_step if step is None else step
        self.users.global_step = now
        epoch = max(now - self.num_imitation_steps - 1, 0) // schedule.steps_per_epoch
        self.users.fire(event, CallbackInput(now, epoch, self.total_training_steps, schedule.steps_per_epoch, **fields))

    def _to_samples(self, groups: list[Group]) -> list[Sample]:
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        samples = to_samples(trajectories)
        self.num_tokens += sum(sum(sample.loss_mask) for sample in samples)
        return mask_overlong(samples, trajectories) if self.config.generator.apply_overlong_filtering else samples

    def _without_pay_for_cuts(self, groups: list[Group]) -> list[Group]:
        """Take the reward of episodes that a length limit ended, if generator.zero_reward_on_non_stop says so."""
        if not self.config.generator.zero_reward_on_non_stop:
            return groups
        return [Group(group.prompt, [zero_reward_on_non_stop(t) for t in group.trajectories]) for group in groups]

    def _penalized(self, groups: list[Group]) -> tuple[list[Group], Metrics]:
        """Take DAPO's penalty for length from the rewards. Dynamic sampling has compared those without it."""
        penalty, generator = self.config.trainer.algorithm.overlong_penalty, self.config.generator
        if penalty.len == 0:
            return groups, {}
        limit = generator.sampling_params.max_generate_length
        penalized = with_overlong_penalties(groups, limit, penalty.len, penalty.factor)
        return penalized, overlong_metrics(groups, penalized)

    def _named_rewards(self, samples: list[Sample], groups: list[Group]) -> NamedRewards | None:
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        return named_rewards(samples, trajectories, self.config.environment.reward_weights)

    def _add_advantages(self, batch: Batch, named: NamedRewards | None) -> tuple[Batch, Metrics]:
        """Add advantages. With use_kl_in_reward the rewards lose the KL first, and its controller is told of it."""
        algorithm, metrics = self.config.trainer.algorithm, group_metrics(batch)
        if not algorithm.use_kl_in_reward:
            return add_advantages(batch, algorithm, named_rewards=named), metrics
        coefficient = self.kl_controller.coefficient
        metrics |= kl_metrics(batch, coefficient, algorithm.kl_estimator_type)
        if batch.loss_mask.any():  # the KL of no token says nothing about the policy
            self.kl_controller.update(metrics["loss/avg_kl"], batch.num_trajectories)
        return add_advantages(batch, algorithm, coefficient, named), metrics

    async def _learn(self, name: str, call: Callable[..., T], *args: Any) -> T:
        """Run a call in the compute thread, so that environments and the progress bar stay alive meanwhile."""
        with self._timed(name):
            return await asyncio.wrap_future(compute.submit(call, *args))

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        started = time.monotonic()
        with span(PHASES.get(name, name)):
            yield
        self._add_time(f"timing/{name}", time.monotonic() - started)

    def _add_time(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds

    def _is_due(self, interval: int) -> bool:
        """Return whether this step ends an interval or a stage; an interval that is not positive never ends."""
        is_last = self.global_step in (self.num_imitation_steps, self.total_training_steps)  # of its stage
        return interval > 0 and (self.global_step % interval == 0 or is_last)

    def _begins_epoch(self) -> bool:
        return self.num_rl_steps >= 0 and self.num_rl_steps % self.prompts.schedule.steps_per_epoch == 0

    def _ends_epoch(self) -> bool:
        """Return whether this step ends an epoch, the last step included: a resumed run may have more epochs."""
        return self.num_rl_steps > 0 and self.num_rl_steps % self.prompts.schedule.steps_per_epoch == 0

    def _clock(self) -> Metrics:
        return (
            self.extra_metrics()
            | (numbers_of(self.users.taken_metrics(), "the trainer's all_metrics") if self.users else {})
            | self.timings
            | self.prompts.metrics
            | {
                "trainer/epoch": max(self.num_rl_steps - 1, 0) // self.prompts.schedule.steps_per_epoch,
                "trainer/global_step": self.global_step,
                "trainer/num_tokens": self.num_tokens,
            }
        )


def __getattr__(name: str) -> Any:
    """Return RayPPOTrainer, which SkyRL's users import from here. It stands above this file: it is looked up late."""
    if name == "RayPPOTrainer":
        from skyrl_train.ray_ppo_trainer import RayPPOTrainer

        return RayPPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
