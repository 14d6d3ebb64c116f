"""The tokens of a batch that are computed once, because samples share a prefix."""

import torch

from skyrl_train.batch.packing import micro_batches, pack
from skyrl_train.batch.prefix_tree import PrefixNode, share_prefixes, shared_segments
from skyrl_train.types import Batch, Sample

PROMPT = list(range(100, 120))  # 20 tokens


def batch_of(*rows: tuple[str, list[int]]) -> Batch:
    """(group, token ids) for each sample, trained on its last token."""
    return pack(
        [
            Sample(
                input_ids=ids,
                loss_mask=[False] * (len(ids) - 1) + [True],
                rollout_logprobs=[0.0] * len(ids),
                rewards=[0.0] * len(ids),
                num_prompt_tokens=1,
                group_id=group,
                trajectory_id=f"{group}_{i}",
            )
            for i, (group, ids) in enumerate(rows)
        ]
    )


def test_the_prompt_of_a_group_stands_once_and_every_token_is_found_again():
    batch = batch_of(("a", [*PROMPT, 5, 6]), ("a", [*PROMPT, 7, 8, 9]))
    segments = share_prefixes(batch)
    assert segments.input_ids.tolist() == [*PROMPT, 5, 6, 7, 8, 9]
    assert segments.position_ids.tolist() == [*range(20), 20, 21, 20, 21, 22]
    assert segments.offsets.tolist() == [0, 20, 22, 25]
    assert segments.before.tolist() == [-1, 0, 0]
    assert segments.row.tolist() == [*range(22), *range(20), 22, 23, 24]
    assert torch.equal(segments.input_ids[segments.row], batch.input_ids)
    assert torch.equal(segments.position_ids[segments.row], batch.position_ids)


def test_groups_do_not_share_and_a_group_of_one_stands_alone():
    batch = batch_of(("a", [*PROMPT, 1]), ("b", [*PROMPT, 2]), ("b", [*PROMPT, 3]), ("c", [*PROMPT, 4]))
    assert share_prefixes(batch).before.tolist() == [-1, -1, 1, 1, -1]
    assert shared_segments(batch)[1] == PrefixNode(1, 3, 0, 20, before=-1)


def test_fifteen_tokens_are_not_worth_sharing():
    batch = batch_of(("a", [*PROMPT[:15], 1]), ("a", [*PROMPT[:15], 2]), ("a", [*PROMPT[:15], 3]))
    segments = share_prefixes(batch)
    assert torch.equal(segments.input_ids, batch.input_ids)
    assert torch.equal(segments.row, torch.arange(48))


def test_samples_that_end_with_the_prefix_have_no_rest():
    batch = batch_of(("a", PROMPT), ("a", [*PROMPT, 1]), ("a", PROMPT))
    segments = share_prefixes(batch)
    assert segments.offsets.tolist() == [0, 20, 21]
    assert segments.row.tolist() == [*range(20), *range(21), *range(20)]


def test_turns_share_their_history_and_trajectories_their_prompt():
    history, more = list(range(200, 260)), list(range(300, 316))  # 60 and 16 tokens
    first = [("a", [*PROMPT, *history, 1]), ("a", [*PROMPT, *history, *more, 2]), ("a", [*PROMPT, *history, *more, 3])]
    second = [("a", [*PROMPT, 4]), ("a", [*PROMPT, *more, 5])]
    assert shared_segments(batch_of(*first, *second)) == [
        PrefixNode(0, 5, 0, 20, before=-1),  # the prompt
        PrefixNode(0, 3, 20, 80, before=0),  # the first trajectory's history
        PrefixNode(0, 1, 80, 81, before=1),
        PrefixNode(1, 3, 80, 96, before=1),  # and what its later turns saw
        PrefixNode(1, 2, 96, 97, before=3),
        PrefixNode(2, 3, 96, 97, before=3),
        PrefixNode(3, 4, 20, 21, before=0),
        PrefixNode(4, 5, 20, 37, before=0),
    ]
    segments = share_prefixes(batch := batch_of(*first, *second))
    assert len(segments.input_ids) == 20 + 60 + 16 + 1 + 1 + 1 + 1 + 17
    assert torch.equal(segments.input_ids[segments.row], batch.input_ids)
    assert torch.equal(segments.position_ids[segments.row], batch.position_ids)


def test_eight_turns_with_growing_history_cost_little_more_than_the_longest():
    history = [list(range(1000 * turn, 1000 * turn + 40)) for turn in range(8)]
    rows = [("a", [*(token for part in history[: turn + 1] for token in part), 7, 7, 7]) for turn in range(8)]
    batch = batch_of(*rows)
    assert batch.num_tokens == 40 * 36 + 3 * 8
    assert len(share_prefixes(batch).input_ids) == 40 * 8 + 3 * 8
    assert [micro.num_samples for micro in micro_batches(batch, 344)] == [8]
    # 40 + 3, 40 + 3, ... until 5 turns stand: 215; the sixth begins anew with 240 + 3 tokens, then 43 more, and so on
    assert [micro.num_samples for micro in micro_batches(batch, 250)] == [5, 1, 1, 1]


def test_micro_batches_count_a_shared_prefix_once():
    batch = batch_of(*(("a", [*PROMPT, i, i]) for i in range(4)))  # 20 + 4 * 2 tokens
    assert [micro.num_samples for micro in micro_batches(batch, 28)] == [4]
    assert [micro.num_samples for micro in micro_batches(batch, 27)] == [3, 1]
    assert [micro.num_samples for micro in micro_batches(batch, 24)] == [2, 2]
    assert [micro.num_samples for micro in micro_batches(batch, 5)] == [1, 1, 1, 1]


def test_micro_batches_keep_together_what_shares_a_prefix():
    rows = [("a", [1] * 10), *(("b", [*PROMPT, i]) for i in range(3)), ("c", [2] * 10)]  # 10, 20 + 3, 10 tokens
    assert [micro.num_samples for micro in micro_batches(batch_of(*rows), 43)] == [5]
    assert [micro.num_samples for micro in micro_batches(batch_of(*rows), 33)] == [4, 1]
    assert [micro.num_samples for micro in micro_batches(batch_of(*rows), 32)] == [1, 3, 1]
    assert [micro.num_samples for micro in micro_batches(batch_of(*rows), 100, max_samples=3)] == [1, 3, 1]
    assert [micro.num_samples for micro in micro_batches(batch_of(*rows), 22)] == [1, 2, 1, 1]
