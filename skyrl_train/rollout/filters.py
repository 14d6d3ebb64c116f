"""Two options for episodes that a length limit ended: zero_reward_on_non_stop and apply_overlong_filtering."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from skyrl_train.types import Sample, Trajectory


def zero_reward_on_non_stop(trajectory: Trajectory) -> Trajectory:
    """Return the trajectory, without reward if a length limit ended it."""
    if trajectory.stop_reason == "stop":
        return trajectory
    samples = trajectory.samples
    if samples is not None:
        samples = [replace(sample, rewards=[0.0] * len(sample.rewards)) for sample in samples]
    return replace(trajectory, turns=[replace(turn, reward=0.0) for turn in trajectory.turns], samples=samples)


def mask_overlong(samples: Iterable[Sample], trajectories: Iterable[Trajectory]) -> list[Sample]:
    """Mask the samples of trajectories that a length limit ended; their rewards still count in their group's mean.

    DAPO (arXiv 2503.14476), section 3.4, "overlong filtering".
    """
    overlong = {t.id for t in trajectories if t.stop_reason == "length"}
    return [_masked(sample) if sample.trajectory_id in overlong else sample for sample in samples]


def _masked(sample: Sample) -> Sample:
    num_tokens = len(sample.input_ids)
    return replace(sample, loss_mask=[False] * num_tokens, rollout_logprobs=[0.0] * num_tokens)
