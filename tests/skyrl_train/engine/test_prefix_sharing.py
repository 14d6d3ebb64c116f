from __future__ import annotations

import random

import pytest

from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.engine.torch import prefix_sharing
from skyrl_train.engine.torch.prefix_sharing import MIN_SHARED, PrefixIndex, common_prefix
from skyrl_train.engine.torch.scheduler import Scheduler
from tests.tiny_models import tiny_policy, tiny_tokenizer


def random_sequences(count: int, rng: random.Random) -> list[list[int]]:
    """They branch off each other at random places, and some are equal."""
    known = [[rng.randrange(3) for _ in range(60)]]
    while len(known) < count:
        parent = rng.choice(known)
        rest = [rng.randrange(3) for _ in range(rng.randrange(40))]
        known.append(parent[: rng.randrange(len(parent) + 1)] + rest or [1])
    return known


def test_the_longest_prefix_is_that_of_comparing_with_all_of_them():
    rng = random.Random(0)
    index: PrefixIndex[int] = PrefixIndex()
    here: dict[int, list[int]] = {}
    for number, tokens in enumerate(random_sequences(400, rng)):
        expected = max((common_prefix(other, tokens) for other in here.values()), default=0)
        length, owner = index.longest(tokens)
        assert length == expected
        assert (owner is None) == (length == 0)
        if owner is not None:
            assert common_prefix(here[owner], tokens) == length
        index.add(tokens, number)
        here[number] = tokens
        if rng.random() < 0.3:
            gone = rng.choice(list(here))
            index.remove(here.pop(gone), gone)
    assert len(index) == len(here)


def test_of_equal_sequences_the_first_is_found_and_each_is_removed_by_its_owner():
    index: PrefixIndex[str] = PrefixIndex()
    tokens = list(range(MIN_SHARED))
    for owner in ("a", "b", "c"):
        index.add(tokens, owner)
    assert index.longest([*tokens, 5]) == (MIN_SHARED, "c")  # what is shared is the same: the nearest
    assert index.longest(tokens) == (MIN_SHARED, "a")
    index.remove(tokens, "a")
    assert index.longest(tokens) == (MIN_SHARED, "b")


def admitted(prompts: list[list[int]]) -> Scheduler:
    scheduler = Scheduler(
        tiny_policy(max_position_embeddings=4096),
        tiny_tokenizer(),
        max_num_seqs=len(prompts),
        max_num_batched_tokens=512,
        max_model_len=1024,
        kv_cache_bytes=1 << 32,
        session_cache_bytes=0,
        cuda_graphs=False,
    )
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(prompt, SamplingParams(max_tokens=8), f"s{i}"))
    scheduler._admit()
    return scheduler


def test_sequences_that_share_as_much_read_it_from_the_same_one():
    system = list(range(40))
    scheduler = admitted([[*system, 50 + (7 * i) % 13, 60, *range(i)] for i in range(12)])
    first, *others = scheduler._slots
    assert {sequence.waits_for for sequence in others} == {first}
    assert {sequence.shared for sequence in others} == {40}


def test_admitting_a_request_compares_it_with_two_others_however_many_there_are(monkeypatch: pytest.MonkeyPatch):
    compared: list[int] = []

    def counted(first: list[int], second: list[int]) -> int:
        compared.append(1)
        return common_prefix(first, second)

    monkeypatch.setattr(prefix_sharing, "common_prefix", counted)
    admitted([[*(7 for _ in range(300)), i // 200, i % 200, 3] for i in range(300)])
    assert len(compared) <= 2 * 300
