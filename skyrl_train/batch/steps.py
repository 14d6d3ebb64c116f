"""The turns of an episode as rows of their own (SkyRL's step-wise trajectories), and back into as few as they need.

one row      1 2 5 6 9 7          two steps    1 2 | 5 6 9       1 2 5 6 9 | 7
loss_mask    0 0 1 1 0 1                       0 0 | 1 1 0       0 0 0 0 0 | 1

Eight turns as rows of their own hold every token of the first turn eight times; joined they hold it once. Where a
template or an environment has rewritten the history, the next row does not begin like the one before, and stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from skyrl_train.types import Sample


def steps(sample: Sample) -> list[Sample]:
    """Return a row for each run of sampled tokens: before it everything so far, behind it what the next one answers.

    Each sampled token is trained, and each reward paid, in exactly one of them.
    """
    begins = [i for i in range(1, len(sample.loss_mask)) if sample.loss_mask[i] and not sample.loss_mask[i - 1]]
    if len(begins) < 2:
        return [sample]
    starts = [min(sample.num_prompt_tokens, begins[0]), *begins[1:]]
    ends = [*begins[1:], len(sample.input_ids)]
    return [
        replace(
            sample,
            input_ids=sample.input_ids[:end],
            loss_mask=[False] * start + sample.loss_mask[start:end],
            rollout_logprobs=[0.0] * start + sample.rollout_logprobs[start:end],
            rewards=[0.0] * from_ + sample.rewards[from_:end],
            num_prompt_tokens=start,
        )
        for start, from_, end in zip(starts, [0, *starts[1:]], ends, strict=True)
    ]


def merged(samples: Iterable[Sample]) -> list[Sample]:
    """Return the rows of one episode, in order, each joined to the one before it if it goes on from there.

    It goes on if it begins with everything up to the last sampled or paid token of the row before, and trains and pays
    none of that itself. Then the gradient of the joined row is the sum of both, and nothing is computed twice.
    """
    found: list[Sample] = []
    for sample in samples:
        if not found or not _goes_on(found[-1], sample):
            found.append(sample)
        elif _num_used(sample) is not None:
            found[-1] = _joined(found[-1], sample)
    return found


def _goes_on(before: Sample, after: Sample) -> bool:
    end = _num_used(before) or len(before.input_ids)
    return (
        before.trajectory_id == after.trajectory_id
        and after.input_ids[:end] == before.input_ids[:end]
        and not any(after.loss_mask[:end])
        and not any(after.rewards[:end])
    )


def _joined(before: Sample, after: Sample) -> Sample:
    end = _num_used(before) or len(before.input_ids)
    return replace(
        after,
        loss_mask=before.loss_mask[:end] + after.loss_mask[end:],
        rollout_logprobs=before.rollout_logprobs[:end] + after.rollout_logprobs[end:],
        rewards=before.rewards[:end] + after.rewards[end:],
        num_prompt_tokens=before.num_prompt_tokens,
    )


def _num_used(sample: Sample) -> int | None:
    """Return the number of tokens up to the last that was sampled or paid; None if there is none."""
    places = reversed(range(len(sample.input_ids)))
    return next((i + 1 for i in places if sample.loss_mask[i] or sample.rewards[i]), None)
