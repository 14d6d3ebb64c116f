"""Small batches for tests."""

from __future__ import annotations

import torch

from skyrl_train.batch.packing import pack
from skyrl_train.types import Batch, Sample


def sample(mask: str, rewards: list[float] | None = None, *, group: str = "a", trajectory: str = "a_0") -> Sample:
    """`mask` is the loss mask as a string: "0011"; the token ids count from 1; `rewards` defaults to 0.

    The logprob of a sampled token is -0.5 - place / 8.
    """
    num_tokens = len(mask)
    return Sample(
        input_ids=list(range(1, num_tokens + 1)),
        loss_mask=[letter == "1" for letter in mask],
        rollout_logprobs=[-0.5 - place / 8 if letter == "1" else 0.0 for place, letter in enumerate(mask)],
        rewards=rewards or [0.0] * num_tokens,
        num_prompt_tokens=1,
        group_id=group,
        trajectory_id=trajectory,
    )


def scored(*scores: tuple[str, float]) -> Batch:
    """One trajectory of one prompt token and two sampled tokens for each (group, score)."""
    return pack(
        [
            sample("011", [0.0, 0.0, score], group=group, trajectory=f"{group}_{i}")
            for i, (group, score) in enumerate(scores)
        ]
    )


def random_batch(
    *, num_prompts: int = 3, num_samples: int = 4, vocab_size: int = 258, seed: int = 0, max_length: int = 14
) -> Batch:
    """Samples of various lengths, with holes in their masks, random tokens, logprobs and advantages."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples = []
    for prompt in range(num_prompts):
        for repetition in range(num_samples):
            length = draw(max_length, 4)
            mask = [False, False] + [draw(4) > 0 for _ in range(length - 3)] + [True]
            samples.append(
                Sample(
                    input_ids=[draw(vocab_size) for _ in range(length)],
                    loss_mask=mask,
                    rollout_logprobs=[-0.1 * draw(60) if is_sampled else 0.0 for is_sampled in mask],
                    rewards=[0.0] * (length - 1) + [float(draw(3))],
                    num_prompt_tokens=2,
                    group_id=str(prompt),
                    trajectory_id=f"{prompt}_{repetition}",
                )
            )
    return pack(samples)


def shared_batch(seed: int = 0) -> Batch:
    """Groups whose samples begin alike: a prompt of 40, one of 17 with a shared first turn, a group of one, short ones.

    Some samples end with the prefix, masks have holes, and rests are as short as 1 and as long as 70 tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(size: int) -> list[int]:
        return torch.randint(258, (size,), generator=generator).tolist()

    def rows(group: str, prefix: list[int], *rests: int) -> list[Sample]:
        samples = []
        for i, rest in enumerate(rests):
            length = len(prefix) + rest
            free = torch.rand(length, generator=generator) < 0.7
            mask = [place > 10 and bool(free[place]) for place in range(length - 1)] + [True]
            samples.append(
                Sample(
                    input_ids=prefix + tokens(rest),
                    loss_mask=mask,
                    rollout_logprobs=[
                        -5.0 * is_sampled - 0.01 * place * is_sampled for place, is_sampled in enumerate(mask)
                    ],
                    rewards=[0.0] * (length - 1) + [float(torch.randint(3, (), generator=generator))],
                    num_prompt_tokens=10,
                    group_id=group,
                    trajectory_id=f"{group}_{i}",
                )
            )
        return samples

    prompt = tokens(17)
    turns = [*rows("turns", prompt + tokens(30), 5, 9), *rows("turns", prompt, 12, 4)]
    alone, brief = rows("alone", tokens(30), 8), rows("brief", tokens(12), 3, 6, 2)
    return pack([*rows("prompt", tokens(40), 1, 33, 70, 0, 20), *turns, *alone, *brief])


def uneven_batch(seed: int = 0) -> Batch:
    """A group that costs more than all others, one of equal rewards, and one whose tokens were all filtered out."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for group, mask, rewards in (
        ("large", "00" + "1" * 30, [0.0, 1.0, 2.0, 0.0]),
        ("equal", "0011", [1.0, 1.0]),
        ("filtered", "0000000", [0.0, 1.0]),
    ):
        for i, reward in enumerate(rewards):
            row = sample(mask, [0.0] * (len(mask) - 1) + [reward], group=group, trajectory=f"{group}_{i}")
            row.input_ids[:] = torch.randint(258, (len(mask),), generator=generator).tolist()
            rows.append(row)
    return pack(rows)
