"""Trajectories become samples: flat rows of tokens with the loss mask, logprob and reward of each token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from skyrl_train.batch.steps import merged
from skyrl_train.types import EpisodeEnd, Group, Sample, Trajectory, Turn
from skyrl_train.users_functions import WrongFunction


def to_samples(trajectories: Iterable[Trajectory]) -> list[Sample]:
    """Return the samples to train on, in the order of the trajectories.

    As long as each turn's prompt begins with every token so far, the turns extend one sample. A turn whose history was
    edited opens a new sample of the same trajectory, in which only that turn's reply (and what extends it) is trained.

        turn 1: prompt [1 2], sampled [5 6]      turn 2: prompt [1 2 5 6 9], sampled [7]
        input_ids  1 2 5 6 9 7
        loss_mask  0 0 1 1 0 1

    Samples that a generator or a hook of the user made are taken as they are. An environment failure gives no sample,
    and neither does a trajectory in which the policy sampled no token.
    """
    samples: list[Sample] = []
    for trajectory in trajectories:
        if trajectory.end is EpisodeEnd.ENV_FAILURE:
            continue
        if trajectory.samples is not None:
            samples += merged(trajectory.samples)  # masked ones too: their rewards count in the mean of the group
            continue
        drafts = _drafts(trajectory.turns)
        _check_provenance(trajectory, drafts)
        samples += [draft.sample(trajectory) for draft in drafts if any(draft.loss_mask)]
    return samples


def check_shaped(groups: Any, before: list[str]) -> None:
    """Raise WrongFunction unless these are the episodes that a user's hook was given, with rewards on their tokens."""
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Group) for group in groups):
        raise WrongFunction(
            f"shape_rewards returned {type(groups).__name__}; it must return the list of groups that it was given, "
            "changed or not"
        )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if [trajectory.id for trajectory in trajectories] != before:
        raise WrongFunction(
            f"shape_rewards was given {len(before)} episodes and returned {len(trajectories)} or others"
        )
    for trajectory in trajectories:
        if trajectory.samples is None:
            continue
        placed = sum(sum(sample.rewards) for sample in trajectory.samples)
        if abs(placed - trajectory.reward) > 1e-6 * max(1.0, abs(placed)):
            raise WrongFunction(
                f"episode {trajectory.id}: its turns were paid {trajectory.reward}, its samples {placed}, and only "
                "those are trained; change the reward with Trajectory.plus"
            )


def num_unplaced_rewards(trajectories: Iterable[Trajectory]) -> int:
    """Return how many rewards were paid before the policy had sampled any token: no sampled token carries them.

    A turn counts once; in samples that a generator or a hook made, a token does. A sample that is masked whole was left
    out on purpose and does not count.
    """
    count = 0
    for trajectory in trajectories:
        if trajectory.end is EpisodeEnd.ENV_FAILURE:
            continue
        if trajectory.samples is None:
            before = takewhile(lambda turn: not turn.response_ids, trajectory.turns)
            count += sum(turn.reward != 0.0 for turn in before)
        for sample in trajectory.samples or []:
            before_first = sample.rewards[: sample.loss_mask.index(True)] if any(sample.loss_mask) else []
            count += sum(reward != 0.0 for reward in before_first)
    return count


@dataclass(slots=True)
class _Draft:
    """A sample under construction, while its turns are joined."""

    num_prompt_tokens: int
    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def is_extended_by(self, turn: Turn) -> bool:
        return turn.prompt_ids[: len(self.input_ids)] == self.input_ids

    def append(self, token_ids: list[int], logprobs: list[float] | None) -> None:
        """Append tokens: sampled ones with their logprobs, those that the policy did not sample with None."""
        self.input_ids += token_ids
        self.loss_mask += [logprobs is not None] * len(token_ids)
        self.rollout_logprobs += [0.0] * len(token_ids) if logprobs is None else logprobs
        self.rewards += [0.0] * len(token_ids)

    def sample(self, trajectory: Trajectory) -> Sample:
        return Sample(
            input_ids=self.input_ids,
            loss_mask=self.loss_mask,
            rollout_logprobs=self.rollout_logprobs,
            rewards=self.rewards,
            num_prompt_tokens=self.num_prompt_tokens,
            group_id=trajectory.prompt.uid,
            trajectory_id=trajectory.id,
        )


def _drafts(turns: list[Turn]) -> list[_Draft]:
    drafts: list[_Draft] = []
    last_sampled: tuple[_Draft, int] | None = None  # the token that carries the reward
    for turn in turns:
        if not drafts or not drafts[-1].is_extended_by(turn):
            drafts.append(_Draft(num_prompt_tokens=len(turn.prompt_ids)))
        draft = drafts[-1]
        draft.append(turn.prompt_ids[len(draft.input_ids) :], None)
        draft.append(turn.response_ids, turn.logprobs)
        if turn.response_ids:
            last_sampled = draft, len(draft.input_ids) - 1
        if last_sampled is not None:
            last_sampled[0].rewards[last_sampled[1]] += turn.reward
    return drafts


def _check_provenance(trajectory: Trajectory, drafts: list[_Draft]) -> None:
    """Raise unless the trained tokens and logprobs are those that the engine sampled, one for one. Always on."""
    sampled = [pair for turn in trajectory.turns for pair in zip(turn.response_ids, turn.logprobs, strict=True)]
    trained = [
        (token, logprob)
        for draft in drafts
        for token, mask, logprob in zip(draft.input_ids, draft.loss_mask, draft.rollout_logprobs, strict=True)
        if mask
    ]
    if sampled != trained:
        raise RuntimeError(
            f"trajectory {trajectory.id}: {len(sampled)} sampled tokens became "
            f"{len(trained)} trained tokens, or other ones; this is a bug in batch/samples.py"
        )
