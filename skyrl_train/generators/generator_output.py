"""SkyRL's GeneratorOutput into groups and back: token ids, masks, rewards and logprobs stay one to one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, groupby
from typing import Any

from skyrl_train.batch.samples import to_samples
from skyrl_train.batch.steps import merged, steps
from skyrl_train.generators.base import GeneratorOutput, TrajectoryID
from skyrl_train.types import EpisodeEnd, Group, Prompt, Sample, Trajectory, Turn
from skyrl_train.users_functions import WrongFunction

LISTS = ("prompt_token_ids", "response_ids", "rewards", "loss_masks")
PLAIN = {*LISTS, "rollout_logprobs", "is_last_step", "stop_reasons"}
PER_TOKEN = ("loss_masks", "rollout_logprobs")
FAILED = "env_failure"  # the stop reason of an episode that its environment broke: it is nobody's reward


class WrongOutput(WrongFunction):
    """A generator returned something that cannot be trained on."""


def plain_output(output: Any) -> Any:
    """Return a generator's output with plain lists and numbers in place of arrays, tensors, tuples and NumPy's numbers.

    What is no dictionary comes back as it is; `check_output` says what is wrong with it.
    """
    if not isinstance(output, Mapping):
        return output
    return {str(name): _plain(value) if name in PLAIN else value for name, value in output.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(value) if all(type(x) in (int, float, bool, str) for x in value) else [_plain(x) for x in value]
    return value.tolist() if hasattr(value, "tolist") else value  # an array, a tensor or a number of theirs


def check_output(output: Any, num_episodes: int) -> None:
    """Raise WrongOutput, which names the entry and what is wrong with it."""
    missing = [name for name in LISTS if not isinstance(output, dict) or not isinstance(output.get(name), list)]
    if missing:
        raise WrongOutput(f"the generator's output lacks the lists {', '.join(missing)}")
    num = len(output["response_ids"])
    for name in (*LISTS, "stop_reasons", "rollout_logprobs", "trajectory_ids", "is_last_step"):
        values = output.get(name)
        if values is not None and len(values) != num:
            raise WrongOutput(f"the generator returned {num} response_ids but {len(values)} {name}")
    episodes = num if output.get("is_last_step") is None else sum(map(bool, output["is_last_step"]))
    if episodes != num_episodes:
        raise WrongOutput(f"the generator was given {num_episodes} prompts and returned {episodes} episodes")
    is_last, names = output.get("is_last_step"), output.get("trajectory_ids")
    if is_last is not None:
        if names is None:
            raise WrongOutput("an output with is_last_step needs trajectory_ids, one per turn")
        _check_steps(is_last, names, _entries_by_episode(output))
    if len({isinstance(reward, list) for reward in output["rewards"]}) > 1:
        raise WrongOutput("the generator mixed rewards per response with rewards per token; return one kind")
    for i in range(num):
        _check_entry(output, i)


def _check_steps(is_last: list[bool], names: list[TrajectoryID], episodes: list[list[int]]) -> None:
    """Raise WrongOutput unless the turns of each episode stand together, the one marked as its last at their end."""
    if not is_last[-1]:
        raise WrongOutput("the last entry of an output with is_last_step must end its episode")
    for entries in episodes:
        last = entries[-1]
        other = next((i for i in entries if names[i] != names[last]), None)
        if other is not None:
            raise WrongOutput(
                f"entry {other} belongs to {names[other]}, and entry {last}, the next marked as a last step, to "
                f"{names[last]}; return the turns of an episode in a row"
            )


def repeats_rewards(output: GeneratorOutput) -> bool:
    """Return whether every turn of every episode of several turns is paid what its last one is, and that is not 0.

    SkyRL reads the reward of the last step only, so a generator may repeat it; here the turns of an episode add up.
    """
    if output.get("is_last_step") is None:
        return False
    paid = [sum(reward) if isinstance(reward, list) else reward for reward in output["rewards"]]
    several = [entries for entries in _entries_by_episode(output) if len(entries) > 1]
    is_repeated = all(paid[i] == paid[entries[-1]] for entries in several for i in entries)
    return is_repeated and any(paid[entries[-1]] for entries in several)


def _check_entry(output: GeneratorOutput, i: int) -> None:
    ids, reward = output["response_ids"][i], output["rewards"][i]
    if not ids or not output["prompt_token_ids"][i]:
        raise WrongOutput(f"entry {i} has an empty prompt or response; give a failed episode one masked token")
    if not all(isinstance(token, int) and token >= 0 for token in [*ids, *output["prompt_token_ids"][i]]):
        raise WrongOutput(f"entry {i}: token ids must be whole numbers of at least 0")
    lengths = {name: len(values[i]) for name in PER_TOKEN if (values := output.get(name)) is not None}
    if isinstance(reward, list):
        lengths["rewards"] = len(reward)
    wrong = {name: length for name, length in lengths.items() if length != len(ids)}
    if wrong:
        said = ", ".join(f"{length} {name}" for name, length in wrong.items())
        raise WrongOutput(f"entry {i} has {len(ids)} response_ids but {said}")
    if not set(output["loss_masks"][i]) <= {0, 1}:
        raise WrongOutput(f"entry {i}: loss_masks must be 0 or 1")
    logprobs = (output.get("rollout_logprobs") or {i: []})[i] if output.get("rollout_logprobs") else []
    rewards = reward if isinstance(reward, list) else [reward]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in [*rewards, *logprobs]):
        raise WrongOutput(f"entry {i}: rewards and logprobs must be finite numbers")


def groups_of(
    output: GeneratorOutput, prompts: Sequence[Prompt], samples_per_prompt: int, tokenizer: Any, version: int
) -> list[Group]:
    """Return the checked output as groups; `prompts` in the order of the input, each once."""
    episodes = _entries_by_episode(output)
    groups = []
    for position, prompt in enumerate(prompts):
        own = episodes[position * samples_per_prompt : (position + 1) * samples_per_prompt]
        trajectories = [
            _trajectory(output, entries, prompt, repetition, tokenizer, version)
            for repetition, entries in enumerate(own)
        ]
        groups.append(Group(prompt, trajectories))
    return groups


def _entries_by_episode(output: GeneratorOutput) -> list[list[int]]:
    """Return the entries of each episode: one, or its turns up to the one that is the last step."""
    is_last = output.get("is_last_step")
    if is_last is None:
        return [[i] for i in range(len(output["response_ids"]))]
    ends = [0, *accumulate(map(bool, is_last[:-1]))]  # the number of episodes that ended before each entry
    return [[i for i, _ in members] for _, members in groupby(enumerate(ends), key=lambda pair: pair[1])]


def _trajectory(
    output: GeneratorOutput, entries: list[int], prompt: Prompt, repetition: int, tokenizer: Any, version: int
) -> Trajectory:
    reasons = output.get("stop_reasons") or ["stop"] * len(output["response_ids"])
    reason = reasons[entries[-1]]
    empty = Trajectory(prompt, repetition, 0, prompt.messages, [], EpisodeEnd.ENV_FAILURE, failure="of the generator")
    if reason == FAILED:
        return empty
    samples = [_sample(output, i, prompt, empty.id) for i in entries]
    turns = [turn for sample in samples for turn in _turns(sample, tokenizer, reason, version)]
    end = EpisodeEnd.OUT_OF_TOKENS if reason == "length" else EpisodeEnd.FINISHED
    return replace(empty, turns=turns, end=end, failure=None, samples=samples)


def _sample(output: GeneratorOutput, i: int, prompt: Prompt, trajectory_id: str) -> Sample:
    prompt_ids, ids, reward = output["prompt_token_ids"][i], output["response_ids"][i], output["rewards"][i]
    mask = [bool(bit) for bit in output["loss_masks"][i]]
    all_logprobs = output.get("rollout_logprobs")
    logprobs = [math.nan] * len(ids) if all_logprobs is None else [float(x) for x in all_logprobs[i]]
    rewards = list(map(float, reward)) if isinstance(reward, list) else [0.0] * (len(ids) - 1) + [float(reward)]
    before = len(prompt_ids)
    return Sample(
        input_ids=[*prompt_ids, *ids],
        loss_mask=[False] * before + mask,
        rollout_logprobs=[0.0] * before + [x if bit else 0.0 for x, bit in zip(logprobs, mask, strict=True)],
        rewards=[0.0] * before + _on_sampled(rewards, mask),
        num_prompt_tokens=before,
        group_id=prompt.uid,
        trajectory_id=trajectory_id,
    )


def _on_sampled(rewards: list[float], mask: list[bool]) -> list[float]:
    """Move rewards of tokens that the policy did not sample (an added end of sequence) to the sampled token before."""
    placed, last = [0.0] * len(rewards), None
    for i, (reward, is_sampled) in enumerate(zip(rewards, mask, strict=True)):
        last = i if is_sampled else last
        placed[i if last is None else last] += reward
    return placed


def _turns(sample: Sample, tokenizer: Any, stop_reason: str, version: int) -> list[Turn]:
    """Return one turn for each run of sampled tokens, for people to read; a response without any is one turn."""
    bounds: list[tuple[int, int]] = []
    for is_sampled, run in groupby(range(len(sample.input_ids)), key=lambda i: sample.loss_mask[i]):
        places = list(run)
        if is_sampled:
            bounds.append((places[0], places[-1] + 1))
    bounds = bounds or [(sample.num_prompt_tokens, len(sample.input_ids))]
    paid_until = [*(start for start, _ in bounds[1:]), len(sample.input_ids)]
    paid_from = [0, *paid_until[:-1]]
    return [
        Turn(
            prompt_ids=sample.input_ids[:start],
            response_ids=sample.input_ids[start:end],
            logprobs=[0.0 if math.isnan(x) else x for x in sample.rollout_logprobs[start:end]],
            reward=sum(sample.rewards[first:last]),
            text=tokenizer.decode(sample.input_ids[start:end], skip_special_tokens=True),
            stop_reason="length" if stop_reason == "length" else "stop",
            policy_version=version,
        )
        for (start, end), first, last in zip(bounds, paid_from, paid_until, strict=True)
    ]


def output_of(
    groups: Sequence[Group], *, one_reward: bool, failed_too: bool = False, step_wise: bool = False
) -> tuple[GeneratorOutput, list[str]]:
    """Return (what SkyRL's generator would have returned for these groups, the uid of each entry).

    one_reward: one number per entry, as for `generator.batched=true`, else one per response token. An episode that its
    environment broke, or in which nothing was sampled, is left out, or with failed_too one masked token whose stop
    reason says so. step_wise: one entry per turn, with is_last_step; else an entry per sample, which are several where
    the history was edited.
    """
    trajectories = [t for group in groups for t in group.trajectories if failed_too or to_samples([t])]
    rows = [
        (t, sample, sample is own[-1])
        for t in trajectories
        for own in [_rows_of(t, step_wise=step_wise) or [_masked_token(t)]]
        for sample in own
    ]
    logprobs = [s.rollout_logprobs[s.num_prompt_tokens :] for _, s, _ in rows]
    has_steps = step_wise or len(rows) > len(trajectories)
    output: GeneratorOutput = {
        "prompt_token_ids": [s.input_ids[: s.num_prompt_tokens] for _, s, _ in rows],
        "response_ids": [s.input_ids[s.num_prompt_tokens :] for _, s, _ in rows],
        "rewards": [sum(s.rewards) for _, s, _ in rows]
        if one_reward
        else [s.rewards[s.num_prompt_tokens :] for _, s, _ in rows],
        "loss_masks": [[int(bit) for bit in s.loss_mask[s.num_prompt_tokens :]] for _, s, _ in rows],
        "stop_reasons": [FAILED if t.end is EpisodeEnd.ENV_FAILURE else t.stop_reason for t, _, _ in rows],
        "rollout_metrics": None,
        "rollout_logprobs": None if any(map(math.isnan, chain(*logprobs))) else logprobs,  # the generator gave none
        "trajectory_ids": [TrajectoryID(t.prompt.uid, t.repetition) for t, _, _ in rows],
        "is_last_step": [is_last for _, _, is_last in rows] if has_steps else None,
    }
    return output, [t.prompt.uid for t, _, _ in rows]


def _rows_of(trajectory: Trajectory, *, step_wise: bool) -> list[Sample]:
    samples = to_samples([trajectory])
    return [step for sample in samples for step in steps(sample)] if step_wise else samples


def _masked_token(trajectory: Trajectory) -> Sample:
    """Return the row of an episode without any sampled token."""
    return Sample([0, 0], [False, False], [0.0, 0.0], [0.0, trajectory.reward], 1, trajectory.prompt.uid, trajectory.id)


def num_episodes_in(groups: Sequence[Group]) -> int:
    """Return how many episodes `output_of` writes."""
    return sum(bool(to_samples([t])) for group in groups for t in group.trajectories)


def with_output(groups: Sequence[Group], output: GeneratorOutput, *, step_wise: bool = False) -> list[Group]:
    """Return the groups that `output_of` was made of, with the output's rewards and loss masks as they are now."""
    entries = iter(range(len(output["response_ids"])))
    return [
        Group(group.prompt, [_with_entries(t, entries, output, step_wise=step_wise) for t in group.trajectories])
        for group in groups
    ]


def _with_entries(
    trajectory: Trajectory, entries: Iterator[int], output: GeneratorOutput, *, step_wise: bool
) -> Trajectory:
    samples = []
    before = _rows_of(trajectory, step_wise=step_wise)
    for old in before:
        i = next(entries)
        new = _sample(output, i, trajectory.prompt, trajectory.id)
        if new.input_ids != old.input_ids:
            raise WrongOutput(
                f"the tokens of entry {i} were changed: what is trained is what was sampled; set its loss mask to 0 "
                "to leave it out"
            )
        samples.append(new)
    if not before:
        return trajectory
    change = sum(sum(new.rewards) - sum(old.rewards) for new, old in zip(samples, before, strict=True))
    last = trajectory.turns[-1]
    return replace(
        trajectory, samples=merged(samples), turns=[*trajectory.turns[:-1], replace(last, reward=last.reward + change)]
    )
