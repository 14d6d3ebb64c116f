"""Sampling: the distribution is right, filters keep what they should, a draw depends on (seed, position) only."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from skyrl_train.engine.base import SamplingParams
from skyrl_train.engine.torch import sampling
from skyrl_train.engine.torch.batched_sampling import BatchedDraw
from skyrl_train.engine.torch.draws import Row, uniforms_of
from skyrl_train.ops.base import Draw
from skyrl_train.ops.cpu.decode_kernels import DecodeKernels, NoKernels, Shape

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
DRAWS = 4000


@pytest.fixture(autouse=True, params=["kernels", "torch", "batched"])
def way(request, monkeypatch) -> None:
    """Every test draws with the compiled kernels, without, and as on a GPU."""
    monkeypatch.setitem(globals(), "BATCHED", request.param == "batched")
    compiled = None
    if request.param == "kernels":
        try:
            compiled = DecodeKernels(Shape(4, 2, 8, torch.float32)).draw
        except NoKernels as reason:
            pytest.skip(str(reason))
    monkeypatch.setitem(globals(), "DRAW", compiled)


DRAW: Draw | None = None
BATCHED = False


def sample(logits: torch.Tensor, rows: list[Row]) -> tuple[list[int], list[float]]:
    if BATCHED:
        return BatchedDraw(logits.contiguous(), rows).read()
    return sampling.sample(logits.contiguous(), rows, DRAW)


def row(seed: int = 0, position: int = 0, tokens: tuple[int, ...] = (), banned: tuple[int, ...] = (), **params) -> Row:
    return Row(SamplingParams(max_tokens=1, seed=seed, **params), position, tokens, banned)


def frequencies(
    logits: list[float], banned: tuple[int, ...] = (), tokens: tuple[int, ...] = (), **params
) -> list[float]:
    rows = [row(seed, tokens=tokens, banned=banned, **params) for seed in range(DRAWS)]
    drawn, _ = sample(torch.tensor([logits]).expand(DRAWS, -1), rows)
    return [drawn.count(token) / DRAWS for token in range(len(logits))]


def assert_frequencies(measured: list[float], expected: list[float]) -> None:
    """Chi-square of 4000 draws; 25 is exceeded once in 20,000 times with four degrees of freedom."""
    for share, probability in zip(measured, expected, strict=True):
        assert (share == 0) == (probability == 0)
    chi = sum(DRAWS * (m - e) ** 2 / e for m, e in zip(measured, expected, strict=True) if e)
    assert chi < 25


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),  # 0.4 + 0.3 is not enough, + 0.15 is
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),  # at least 0.3 * 0.4 = 0.12
        ({"top_k": 3, "top_p": 0.8}, [4 / 7, 3 / 7, 0, 0, 0]),  # of the three, 0.4 + 0.3 hold 0.82
        ({"banned": (0, 4)}, [0, 0.3 / 0.55, 0.15 / 0.55, 0.1 / 0.55, 0]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0, "banned": (0,)}, [0, 1, 0, 0, 0]),
    ],
)
def test_the_draws_follow_the_cut_distribution(params, expected):
    assert_frequencies(frequencies([math.log(p) for p in PROBABILITIES], **params), expected)


def test_a_vocabulary_of_many_blocks_is_drawn_from_evenly():
    drawn, logprobs = sample(torch.zeros(DRAWS, 1000), [row(seed) for seed in range(DRAWS)])
    assert_frequencies([sum(t // 200 == part for t in drawn) / DRAWS for part in range(5)], [0.2] * 5)
    assert logprobs == pytest.approx([-math.log(1000)] * DRAWS)


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    # Seen: tokens 0 and 1. 2 / 2 = 1 and -1 * 2 = -2; token 2 keeps 1.
    weights = [math.e, math.e**-2, math.e]
    expected = [weight / sum(weights) for weight in weights]
    assert_frequencies(frequencies([2.0, -1.0, 1.0], tokens=(0, 1, 1), repetition_penalty=2.0), expected)


def test_logprobs_ignore_filters_but_not_the_temperature():
    logits = torch.tensor([[math.log(p) for p in PROBABILITIES]])
    tokens, (logprob,) = sample(logits, [row(temperature=0.5, top_k=1, repetition_penalty=1.1)])
    assert tokens == [0]
    assert logprob == pytest.approx(math.log(0.16 / 0.285))
    assert sample(logits, [row(temperature=0)])[1] == pytest.approx([math.log(0.4)])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((DRAWS, 600), -torch.inf)
    logits[:, [3, 299, 599]] = torch.tensor([-4.0, 0.0, -3.0])
    drawn, _ = sample(logits, [row(seed) for seed in range(DRAWS)])
    assert set(drawn) == {3, 299, 599}


def test_rows_with_different_parameters_do_not_touch_each_other():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    rows = [row(1), row(2, top_p=0.5), row(3, temperature=0), row(4, temperature=2.0, min_p=0.1)]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]]) for i in range(4)]
    assert together == ([tokens[0] for tokens, _ in alone], pytest.approx([values[0] for _, values in alone]))
    assert torch.equal(logits, torch.randn(4, 300, generator=torch.Generator().manual_seed(0)))


def test_uniform_numbers_are_spread_over_seeds_and_positions():
    over_seeds = uniforms_of([row(seed, position=5) for seed in range(2000)])
    over_positions = uniforms_of([row(5, position=position) for position in range(2000)])
    for numbers in (over_seeds, over_positions):
        tenths = [sum(int(number * 10) == tenth for number in numbers) for tenth in range(10)]
        assert sum((count - 200) ** 2 / 200 for count in tenths) < 35
        mean = sum(a * b for a, b in pairwise(numbers)) / 1999
        assert mean == pytest.approx(0.25, abs=0.02)  # neighbours are independent
    minus_one, one, large = uniforms_of([row(-1, position=0), row(1, position=0), row(2**80, position=10**6)])
    assert minus_one != one
    assert 0 <= large < 1


def test_a_uniform_number_is_that_of_splitmix64():
    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    gamma = 0x9E3779B97F4A7C15
    for seed, position in ((0, 0), (7, 3), (2**64 - 1, 10**6)):
        expected = mix((mix((seed + gamma) % 2**64) + gamma * (position + 1)) % 2**64) >> 32
        assert uniforms_of([row(seed, position=position)]) == [expected / 2**32]


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        sample(torch.tensor([[0.0, float("nan")]]), [row()])
