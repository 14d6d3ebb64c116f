"""Dynamic sampling: a step learns only from prompts whose episodes score differently, and plays on until it has enough.

Group-relative advantages of equal scores are 0, so such a prompt teaches nothing. DAPO (arXiv 2503.14476), section 3.2.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loguru import logger

from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory

if TYPE_CHECKING:
    from skyrl_train.config import DynamicSamplingConfig


class TooManyBatches(RuntimeError):
    """A step has played as many batches as it may, and too few of their prompts can be learned from."""


@dataclass
class DynamicSampling:
    """The groups of one step: played batch by batch, until `is_done`.

    filter: groups that score equally are dropped, and batches are added up until `num_groups` are left.
    replace: in a batch of which enough groups score differently, each other group is replaced by one of these; a batch
    of which too few do is dropped, and the next is played.
    Without a type one batch is taken as it is.
    """

    config: DynamicSamplingConfig
    num_groups: int  # prompts of a batch, and of the step
    seed: int
    groups: list[Group] = field(default_factory=list)  # to learn from
    played: list[Group] = field(default_factory=list)  # all of them
    num_batches: int = 0
    num_different: int = 0  # of the played groups, those that score differently

    @property
    def is_done(self) -> bool:
        return self.num_batches > 0 if self.config.type is None else len(self.groups) >= self.num_groups

    def uid_of(self, prompt: Prompt) -> str:
        """Return the prompt's uid in the coming batch: a small data set may give it to one step more than once."""
        return f"{prompt.uid}#{self.num_batches}" if self.num_batches else prompt.uid

    def add(self, groups: list[Group]) -> None:
        """Take a batch that was played. TooManyBatches: it is the last one allowed, and the step still lacks groups."""
        self.num_batches += 1
        self.played += groups
        if self.config.type is None:
            self.groups = groups
            return
        different = [group for group in groups if scores_differ(group)]
        self.num_different += len(different)
        if self.config.type == "filter":
            self.groups = (self.groups + different)[: self.num_groups]
        elif len(different) > self.config.min_replace_ratio * len(groups):
            self.groups = replaced(groups, different, derive_seed("dynamic sampling", self.seed, self.num_batches))
        if not self.is_done:
            self._refuse_if_last()
            logger.info(f"dynamic sampling: {self._state()}; another batch is played")

    def metrics(self) -> dict[str, float]:
        """Return what was played and what was thrown away; nothing without a type."""
        if self.config.type is None:
            return {}
        kept = {trajectory.id for group in self.groups for trajectory in group.trajectories}
        dropped = [t for group in self.played for t in group.trajectories if t.id not in kept]
        return {
            "dynamic_sampling/num_batches": float(self.num_batches),
            "dynamic_sampling/different_group_share": self.num_different / max(len(self.played), 1),
            "dynamic_sampling/num_dropped_episodes": float(len(dropped)),
            "dynamic_sampling/num_dropped_tokens": float(sum(len(u.response_ids) for t in dropped for u in t.turns)),
        }

    def _refuse_if_last(self) -> None:
        most = self.config.max_sample_batches
        if 0 < most <= self.num_batches:
            raise TooManyBatches(
                f"{self._state()}, after trainer.algorithm.dynamic_sampling.max_sample_batches={most} batches. Take "
                "tasks that the policy sometimes solves and sometimes not, more episodes of each "
                "(generator.n_samples_per_prompt), or set trainer.algorithm.dynamic_sampling.type=null"
            )

    def _state(self) -> str:
        if self.config.type == "filter":
            needed = f"the step needs {self.num_groups}"
        else:
            needed = f"a batch needs more than {self.config.min_replace_ratio:.0%}"
        differ = f"the episodes of {self.num_different} of {len(self.played)} prompts score differently"
        return f"{differ}, and {needed}"


def scores_differ(group: Group) -> bool:
    """Return whether the episodes of a group score differently, up to rounding (max - min <= 1e-6 * scale is equal).

    Environment failures do not count, for they are not trained on.
    """
    scores = [trajectory_score(t) for t in group.trajectories if t.end is not EpisodeEnd.ENV_FAILURE]
    scale = max([1.0, *map(abs, scores)])
    return bool(scores) and max(scores) - min(scores) > 1e-6 * scale


def trajectory_score(trajectory: Trajectory) -> float:
    """Return the score that advantages are computed from: the sum of its samples' rewards, where a user made them."""
    if trajectory.samples is not None:
        return float(sum(sum(sample.rewards) for sample in trajectory.samples))
    return trajectory.reward


def replaced(groups: list[Group], different: list[Group], seed: int) -> list[Group]:
    """Return the groups in their order, with a group of `different` in the place of each that is not among them.

    It comes under a uid of its own. They are drawn by chance, none again before all were drawn.
    """
    draw = random.Random(seed)
    kept = {group.prompt.uid for group in different}
    pool: list[Group] = []
    found = []
    for group in groups:
        if group.prompt.uid not in kept:
            pool = pool or draw.sample(different, len(different))
            group = under_another_uid(pool.pop(), f"{group.prompt.uid}=")
        found.append(group)
    return found


def under_another_uid(group: Group, prefix: str) -> Group:
    """Return the same episodes as a group of its own: its uid, and those of its episodes, begin with the prefix."""
    prompt = replace(group.prompt, uid=prefix + group.prompt.uid)
    trajectories = [
        replace(
            trajectory,
            prompt=prompt,
            samples=trajectory.samples
            and [
                replace(sample, group_id=prefix + sample.group_id, trajectory_id=prefix + sample.trajectory_id)
                for sample in trajectory.samples
            ],
        )
        for trajectory in group.trajectories
    ]
    return Group(prompt, trajectories)
