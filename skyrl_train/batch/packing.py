"""Samples become a batch, a batch becomes mini batches (one optimizer step each) and micro batches (one forward each).

The divisor of the loss travels with the data: `with_loss_weights` runs on a whole mini batch, and from then on the loss
is sum(loss_weights * token_loss), however the mini batch is cut.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from skyrl_train.batch.prefix_tree import shared_segments
from skyrl_train.types import Batch, Sample

LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")


def pack(samples: list[Sample]) -> Batch:
    """Lay the samples end to end. Groups and trajectories are numbered in the order in which they first appear."""
    if not samples:
        raise ValueError("no samples: a batch needs at least one, and a step without any makes no update")
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    return Batch(
        input_ids=torch.tensor([token for sample in samples for token in sample.input_ids], dtype=torch.long),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        loss_mask=torch.tensor([mask for sample in samples for mask in sample.loss_mask], dtype=torch.bool),
        rollout_logprobs=torch.tensor([x for sample in samples for x in sample.rollout_logprobs], dtype=torch.float32),
        rewards=torch.tensor([x for sample in samples for x in sample.rewards], dtype=torch.float32),
        group_index=_numbered([sample.group_id for sample in samples]),
        trajectory_index=_numbered([sample.trajectory_id for sample in samples]),
        num_prompt_tokens=torch.tensor([sample.num_prompt_tokens for sample in samples], dtype=torch.long),
    )


def _numbered(names: list[str]) -> Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.long)


def mini_batches(batch: Batch, prompts_per_mini_batch: int) -> list[Batch]:
    """Cut the batch by prompt: a group is never split, and the last mini batch may be smaller."""
    if prompts_per_mini_batch < 1:
        raise ValueError(f"prompts_per_mini_batch={prompts_per_mini_batch} must be at least 1")
    rank = batch.group_index.unique(return_inverse=True)[1]  # group numbers without gaps
    mini_batch_of_sample = rank // prompts_per_mini_batch
    return [
        batch.select(torch.nonzero(mini_batch_of_sample == i).flatten().tolist())
        for i in range(int(mini_batch_of_sample.max()) + 1)
    ]


def with_loss_weights(batch: Batch, loss_reduction: str, max_seq_len: int | None = None) -> Batch:
    """Weigh every token of a mini batch so that sum(loss_weights * token_loss) is the reduction.

    The KL term is always reduced by sequence_mean and the entropy term by token_mean, as SkyRL does it: what their
    coefficients mean does not depend on loss_reduction.
    """
    return replace(
        batch,
        loss_weights=_token_weights(batch, loss_reduction, max_seq_len),
        kl_weights=_token_weights(batch, "sequence_mean"),
        entropy_weights=_token_weights(batch, "token_mean"),
    )


def _token_weights(batch: Batch, loss_reduction: str, max_seq_len: int | None = None) -> Tensor:
    """Return weights [T] so that sum(weights * values) is the reduction. N = masked tokens.

        token_mean               1 / N                                      DAPO, arXiv 2503.14476, eq. 8
        sequence_mean            1 / (episodes * N of the episode)          GRPO, arXiv 2402.03300, eq. 3
        seq_mean_token_sum_norm  1 / (episodes * max_seq_len)               Dr. GRPO, arXiv 2503.20783, listing 1

    episodes: those with at least one masked token; one without any weighs nothing and counts nowhere. An episode counts
    once, however many samples its turns became, so the weights do not depend on which turns could be joined.
    """
    mask = batch.loss_mask.to(torch.float64)
    episodes, episode_of_sample = batch.trajectory_index.unique(return_inverse=True)
    episode_of_token = episode_of_sample[batch.sample_index]
    tokens_of_episode = mask.new_zeros(len(episodes)).index_add(0, episode_of_token, mask)
    num_episodes = (tokens_of_episode > 0).sum().clamp(min=1)
    if loss_reduction == "token_mean":
        weights = mask / mask.sum().clamp(min=1)
    elif loss_reduction == "sequence_mean":
        weights = mask / (num_episodes * tokens_of_episode.clamp(min=1)[episode_of_token])
    elif loss_reduction == "seq_mean_token_sum_norm":
        if max_seq_len is None or max_seq_len < 1:
            raise ValueError(f"seq_mean_token_sum_norm divides by max_seq_len, which is {max_seq_len}: set it to >= 1")
        weights = mask / (num_episodes * max_seq_len)
    else:
        raise ValueError(f"loss_reduction={loss_reduction!r} is unknown; use one of {', '.join(LOSS_REDUCTIONS)}")
    return weights.float()


def micro_batches(batch: Batch, max_tokens: int, max_samples: int | None = None) -> list[Batch]:
    """Cut the batch into `micro_cuts`."""
    return [batch.select(cut) for cut in micro_cuts(batch, max_tokens, max_samples)]


def micro_cuts(batch: Batch, max_tokens: int, max_samples: int | None = None) -> list[list[int]]:
    """Return the samples of each micro batch: whole neighbours within both limits, in the order of the batch.

    `max_tokens` counts what a forward pass computes: a prefix that samples share counts once. Samples that share one
    stay together where the limits allow. A sample longer than `max_tokens` goes alone.
    """
    if max_tokens < 1 or (max_samples is not None and max_samples < 1):
        raise ValueError(f"max_tokens={max_tokens} and max_samples={max_samples} must be at least 1")
    lengths = batch.lengths.tolist()
    own = [0] * batch.num_samples  # tokens that no earlier sample has
    for segment in shared_segments(batch):
        own[segment.first] += segment.end - segment.begin
    # The first sample of each run of samples that share a prefix: it shares nothing with an earlier one.
    begins = [sample for sample in range(batch.num_samples) if own[sample] == lengths[sample]]
    cuts: list[list[int]] = [[]]
    num_tokens = 0
    for start, stop in pairwise([*begins, batch.num_samples]):
        whole, count = sum(own[start:stop]), stop - start
        is_too_much = num_tokens + whole > max_tokens or len(cuts[-1]) + count > (max_samples or math.inf)
        opens = is_too_much and whole <= max_tokens  # a new micro batch holds the run, this one does not
        for sample in range(start, stop):
            is_full = num_tokens + own[sample] > max_tokens or len(cuts[-1]) == max_samples
            if cuts[-1] and (opens or is_full):
                cuts.append([])
                num_tokens = 0
            num_tokens += own[sample] if cuts[-1] else lengths[sample]
            cuts[-1].append(sample)
            opens = False
    return cuts
