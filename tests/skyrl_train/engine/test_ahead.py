"""Steps started before the host has read the last one's tokens: the same completions as one after the other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from skyrl_train.engine.base import Completion, Request
from skyrl_train.engine.torch import batched_sampling
from skyrl_train.engine.torch.batched_sampling import BatchedDraw
from skyrl_train.engine.torch.scheduler import Scheduler, Sequence
from skyrl_train.policy.model import Policy
from tests.skyrl_train.engine.conftest import ask
from tests.skyrl_train.engine.test_pretend_cuda import scheduler_for
from tests.skyrl_train.engine.test_torch_engine import PROMPT, assert_learner_agrees
from tests.tiny_models import tiny_policy

LETTERS = "".join(map(chr, range(32, 127)))


pytestmark = pytest.mark.usefixtures("pretend_cuda")


@pytest.fixture
def policy(policy_on_cuda: Policy) -> Policy:
    return policy_on_cuda


class OneByOne(Scheduler):
    """Reads every step before it starts the next."""

    def _start_ahead(self, step: Any) -> None:
        return None


def pair(policy: Policy) -> tuple[Scheduler, Scheduler]:
    """Return a scheduler that starts steps ahead, and one that does not."""
    ahead, one_by_one = scheduler_for(policy, cuda_graphs=True), scheduler_for(policy, cuda_graphs=True)
    one_by_one.__class__ = OneByOne
    return ahead, one_by_one


def drawn_requests(seed: int, *, count: int) -> list[Request]:
    """Return requests that end in all ways: by their length, by an end token and by stop strings."""
    dice = random.Random(seed)
    cuts: list[dict[str, Any]] = [{}, {"temperature": 0}, {"top_k": 40, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    weights = [8, 2, 2, 0 if seed % 2 else 1]
    return [
        ask(
            PROMPT[dice.randrange(30) :],
            f"{seed} {index}",
            seed=dice.randrange(1000),
            max_tokens=dice.randint(5, 40),
            min_tokens=dice.choice([0, 0, 5]),
            stop=tuple(dice.sample(LETTERS, 60 * (index % 2))),
            **dice.choices(cuts, weights)[0],
        )
        for index in range(count)
    ]


def played(
    scheduler: Scheduler, requests: list[Request], abort: dict[int, int] | None = None
) -> list[Completion | None]:
    """Return the completions. abort: step -> number of the request that is aborted before it."""
    sequences = [scheduler.add(request) for request in requests]
    done: dict[Sequence, Completion] = {}
    for step in range(10_000):
        if scheduler.is_idle:
            break
        if abort and step in abort:
            scheduler.abort(sequences[abort[step]])
        done |= dict(scheduler.step()) if not scheduler.is_idle else {}
    return [done.get(sequence) for sequence in sequences]


def assert_same(ours: list[Completion | None], theirs: list[Completion | None]) -> None:
    assert [c and (c.response_ids, c.stop_reason) for c in ours] == [
        c and (c.response_ids, c.stop_reason) for c in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        if mine and other:
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_completions_are_the_same_and_so_are_those_of_the_next_turn(policy: Policy, seed: int) -> None:
    ahead, one_by_one = pair(policy)
    requests = drawn_requests(seed, count=8)
    first = played(ahead, requests)
    assert {completion.stop_reason for completion in first if completion} == {"stop", "length"}
    assert_same(first, played(one_by_one, requests))
    for request, completion in zip(requests, first, strict=True):
        assert completion is not None
        assert_learner_agrees(policy, request, completion)
    next_turn = [
        ask([*r.prompt_ids, *c.response_ids, 5, 6, 7], r.session_id, seed=9)
        for r, c in zip(requests, first, strict=True)
        if c is not None
    ]
    assert_same(played(ahead, next_turn), played(one_by_one, next_turn))
    assert ahead.stats.tokens_sampled == one_by_one.stats.tokens_sampled
    assert ahead.stats.tokens_reused >= one_by_one.stats.tokens_reused > 0


def test_a_decoding_step_is_started_before_the_last_one_is_read(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    init, read = BatchedDraw.__init__, BatchedDraw.read
    monkeypatch.setattr(BatchedDraw, "__init__", lambda *given: (events.append("start"), init(*given))[1])
    monkeypatch.setattr(BatchedDraw, "read", lambda draw: (events.append("read"), read(draw))[1])
    scheduler = scheduler_for(policy, cuda_graphs=True)
    played(scheduler, [ask(PROMPT, max_tokens=4, min_tokens=4)])
    assert events == ["start", "start", "read", "start", "read", "start", "read", "read"]
    events.clear()
    played(scheduler, [ask(PROMPT, max_tokens=3, min_tokens=3, repetition_penalty=1.1)])
    assert events == ["start", "read"] * 3, "the penalty looks at the last token"


def test_an_aborted_sequence_leaves_the_others_what_they_have(policy: Policy) -> None:
    ahead, one_by_one = pair(policy)
    requests = [ask(PROMPT[i:], f"{i}", seed=i, max_tokens=30, min_tokens=20) for i in range(5)]
    abort = {4: 0, 9: 2, 12: 3}
    ours = played(ahead, requests, abort)
    assert [completion is None for completion in ours] == [True, False, True, True, False]
    assert_same(ours, played(one_by_one, requests, abort))


def test_a_step_of_the_old_weights_is_not_read_once_there_are_new_ones() -> None:
    policy = tiny_policy(device="cuda")
    requests = [ask(PROMPT[i:], f"{i}", seed=i, max_tokens=30, min_tokens=30) for i in range(3)]
    responses = []
    for scheduler in pair(policy):
        before = {name: weight.clone() for name, weight in policy.module.named_parameters()}
        sequences = [scheduler.add(request) for request in requests]
        for _ in range(7):
            assert scheduler.step() == []
        for weight in policy.module.parameters():
            weight.mul_(1.5)
        scheduler.weights_changed(1)
        done: dict[Sequence, Completion] = {}
        while not scheduler.is_idle:
            done |= dict(scheduler.step())
        responses.append([done[sequence].response_ids for sequence in sequences])
        for name, weight in policy.module.named_parameters():
            weight.copy_(before[name])
    assert responses[0] == responses[1]


def test_a_step_ahead_of_tokens_that_were_drawn_again_is_computed_again(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every row counts as underflowed, and what is drawn at first is another token."""
    monkeypatch.setattr(batched_sampling, "UNDERFLOWED", 2.0)
    plainly = BatchedDraw._draw_plainly
    monkeypatch.setattr(BatchedDraw, "_draw_plainly", lambda draw: ((out := plainly(draw))[0] // 2, *out[1:]))
    for request in (ask(PROMPT, seed=3, max_tokens=12, min_tokens=12), ask(PROMPT, seed=4, max_tokens=12)):
        [completion] = played(scheduler_for(policy, cuda_graphs=True), [request])
        assert completion is not None
        assert_learner_agrees(policy, request, completion)
