"""The effects of a length limit: zero rewards, filtering of samples, and a penalty near the limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from skyrl_train.types import EpisodeEnd, Group, Sample, Trajectory


def zero_reward_on_non_stop(trajectory: Trajectory) -> Trajectory:
    """Return the trajectory, without reward if a length limit ended it."""
    if trajectory.stop_reason == "stop":
        return trajectory
    samples = trajectory.samples
    if samples is not None:
        samples = [replace(sample, rewards=[0.0] * len(sample.rewards)) for sample in samples]
    unpaid = [replace(turn, reward=0.0, rewards=dict.fromkeys(turn.rewards, 0.0)) for turn in trajectory.turns]
    return replace(trajectory, turns=unpaid, samples=samples)


def mask_overlong(samples: Iterable[Sample], trajectories: Iterable[Trajectory]) -> list[Sample]:
    """Mask the samples of trajectories that a length limit ended; their rewards still count in their group's mean.

    DAPO (arXiv 2503.14476), section 3.4, "overlong filtering".
    """
    overlong = {t.id for t in trajectories if t.stop_reason == "length"}
    return [_masked(sample) if sample.trajectory_id in overlong else sample for sample in samples]


def overlong_penalty(num_tokens: int, limit: int, buffer: int, factor: float) -> float:
    """Return what a reply of so many tokens is paid for its length, 0 or less.

    DAPO (arXiv 2503.14476), eq. 13, times `factor`: 0 up to limit - buffer, from there a line down to -1 at the limit.
    """
    return -factor * min(max(num_tokens - (limit - buffer), 0) / buffer, 1.0)


def with_overlong_penalties(groups: list[Group], limit: int, buffer: int, factor: float) -> list[Group]:
    """Return the groups with each turn's reward less the penalty of its reply, which the limit acts on."""
    return [
        replace(group, trajectories=[_penalized(t, limit, buffer, factor) for t in group.trajectories])
        for group in groups
    ]


def overlong_metrics(before: list[Group], after: list[Group]) -> dict[str, float]:
    """Return what the penalties cost: the mean over episodes, and the share of episodes that lost anything."""
    pairs = [
        (old.reward, new.reward)
        for group, changed in zip(before, after, strict=True)
        for old, new in zip(group.trajectories, changed.trajectories, strict=True)
        if old.end is not EpisodeEnd.ENV_FAILURE
    ]
    num_episodes = max(len(pairs), 1)
    return {
        "overlong/mean_penalty": sum(new - old for old, new in pairs) / num_episodes,
        "overlong/penalized_share": sum(new < old for old, new in pairs) / num_episodes,
    }


def _penalized(trajectory: Trajectory, limit: int, buffer: int, factor: float) -> Trajectory:
    costs = [overlong_penalty(len(turn.response_ids), limit, buffer, factor) for turn in trajectory.turns]
    if trajectory.samples is not None:  # only their tokens are trained, and which of them are a turn is not known
        return trajectory.plus(sum(costs))
    paid = zip(trajectory.turns, costs, strict=True)
    return replace(trajectory, turns=[replace(turn, reward=turn.reward + cost) for turn, cost in paid])


def _masked(sample: Sample) -> Sample:
    num_tokens = len(sample.input_ids)
    return replace(sample, loss_mask=[False] * num_tokens, rollout_logprobs=[0.0] * num_tokens)
