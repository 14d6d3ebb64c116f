"""Estimators as SkyRL's documents write them: padded tensors in, padded tensors out."""

from __future__ import annotations

import functools
import sys
from collections import defaultdict

import pytest
import torch
from loguru import logger
from torch import tensor
from torch.testing import assert_close

from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.algorithms.registry import AdvantageEstimatorRegistry, register_advantage_estimator
from skyrl_train.algorithms.trial import check_estimator
from skyrl_train.batch.packing import pack
from skyrl_train.config import AlgorithmConfig
from skyrl_train.users_functions import WrongFunction
from tests.skyrl_train.batches import sample

HERE = __name__


def simple_baseline(token_level_rewards, response_mask, index, **kwargs):
    """SkyRL's documented example: the score of a response minus the mean of all."""
    scores = (token_level_rewards * response_mask).sum(dim=-1, keepdim=True)
    advantages = (scores - scores.mean()) * response_mask
    return advantages, advantages.clone()


def by_prompt(token_level_rewards, response_mask, index, **kwargs):
    """A dictionary keyed by uid, as SkyRL's own GRPO is written."""
    scores, of_prompt = token_level_rewards.sum(dim=-1), defaultdict(list)
    for row, uid in enumerate(index):
        assert isinstance(uid, str)
        of_prompt[uid].append(scores[row])
    advantages = torch.stack([scores[i] - torch.stack(of_prompt[uid]).mean() for i, uid in enumerate(index)])
    return advantages.unsqueeze(-1) * response_mask, token_level_rewards


def by_column(token_level_rewards, response_mask, **kwargs):
    """The reward to go, counted from the back of each padded row."""
    return token_level_rewards.flip(-1).cumsum(-1).flip(-1), token_level_rewards


def everything(**kwargs):
    return simple_baseline(**kwargs)


def by_place(token_level_rewards, response_mask, /, index, **kwargs):
    assert {"token_level_rewards", "response_mask"}.isdisjoint(kwargs)
    return simple_baseline(token_level_rewards, response_mask, index)


def with_a_graph(token_level_rewards, response_mask, index):
    return simple_baseline(token_level_rewards.requires_grad_(), response_mask, index)


class Callable:
    def __call__(self, token_level_rewards, response_mask, index):
        return simple_baseline(token_level_rewards, response_mask, index)


def in_numpy(token_level_rewards, response_mask, index):
    scores = (token_level_rewards * response_mask).sum(dim=-1, keepdim=True).numpy()
    advantages = (scores - scores.mean()) * response_mask.numpy()
    return advantages.astype("float64"), advantages.tolist()


scaled = functools.partial(simple_baseline, scale=2)
instance = Callable()


def batch():
    """Prompt a: scores 4 and 0; prompt b: one score 1. Responses of 2, 4 (one observed) and 1 tokens; mean 5/3."""
    return pack(
        [
            sample("0011", [0.0, 0.0, 1.0, 3.0], group="a", trajectory="a_0"),
            sample("011011", group="a", trajectory="a_1"),
            sample("01", [0.0, 1.0], group="b", trajectory="b_0"),
        ]
    )


def advantages(name: str) -> torch.Tensor:
    result = add_advantages(batch(), AlgorithmConfig(advantage_estimator=f"{HERE}:{name}")).advantages
    assert result is not None
    return result


NAMES = ["simple_baseline", "everything", "by_place", "with_a_graph", "scaled", "instance", "in_numpy"]


@pytest.mark.parametrize("name", NAMES)
def test_skyrls_documented_estimator_gets_its_padded_shapes_and_its_numbers_come_back(name):
    first, second, third = 4 - 5 / 3, -5 / 3, 1 - 5 / 3
    zero = 0.0
    expected = [zero, zero, first, first, zero, second, second, zero, second, second, zero, third]
    assert_close(advantages(name), tensor(expected))
    assert not advantages(name).requires_grad


def test_index_holds_the_prompt_of_each_row():
    expected = tensor([0.0, 0, 2, 2, 0, -2, -2, 0, -2, -2, 0, 0])
    assert_close(advantages("by_prompt"), expected)


def test_columns_are_response_tokens():
    assert_close(advantages("by_column"), tensor([0.0, 0, 4, 3, 0, 0, 0, 0, 0, 0, 0, 1]))


def test_the_samples_of_a_trajectory_are_one_row():
    """A history that was edited made two samples; the score of the episode is the sum of both."""
    edited = pack(
        [
            sample("011", [0.0, 0.0, 1.0], group="a", trajectory="a_0"),
            sample("0001", [0.0, 0.0, 0.0, 2.0], group="a", trajectory="a_0"),
            sample("01", [0.0, 1.0], group="a", trajectory="a_1"),
        ]
    )
    # The prompt of the second sample is its first three tokens.
    edited = type(edited)(**{**vars(edited), "num_prompt_tokens": tensor([1, 3, 1])})
    config = AlgorithmConfig(advantage_estimator=f"{HERE}:by_prompt")
    assert_close(add_advantages(edited, config).advantages, tensor([0.0, 1, 1, 0, 0, 0, 1, 0, -1]))


def test_a_registered_name_is_tried_at_start_up_like_an_import_path():
    register_advantage_estimator("simple_baseline")(simple_baseline)
    try:
        check_estimator(AlgorithmConfig(advantage_estimator="simple_baseline"))
    finally:
        AdvantageEstimatorRegistry.unregister("simple_baseline")


def one_number_per_row(token_level_rewards, response_mask, index):
    scores = token_level_rewards.sum(-1)
    return scores, scores


def advantages_alone(token_level_rewards, response_mask, index):
    return token_level_rewards


def wants_more(token_level_rewards, response_mask, index, teacher_logprobs):
    return token_level_rewards, token_level_rewards


def of_two_minds(batch, token_level_rewards):
    return token_level_rewards, token_level_rewards


def divides_by_zero(token_level_rewards, response_mask, index):
    scores = token_level_rewards.sum(-1, keepdim=True)
    return scores / (scores - scores) * response_mask, token_level_rewards


async def nobody_awaits(token_level_rewards, response_mask, index): ...


def other_names(scores, mask, **kwargs):
    return scores * mask, scores


def complex_numbers(token_level_rewards, response_mask, index):
    return token_level_rewards * (1 + 1j), token_level_rewards


def ragged(token_level_rewards, response_mask, index):
    return [[1.0], [1.0, 2.0]], token_level_rewards


def breaks(token_level_rewards, response_mask, index):
    return token_level_rewards @ response_mask, token_level_rewards


def leaves(token_level_rewards, response_mask, index):
    sys.exit(3)


def lacks_a_key(token_level_rewards, response_mask, index):
    return {}["x"]


def yields(token_level_rewards, response_mask, index):
    yield token_level_rewards


class Later:
    async def __call__(self, token_level_rewards, response_mask, index):
        return token_level_rewards, token_level_rewards


LATER, RANGE = Later(), range


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one_number_per_row", r"returned \(a tensor \[4\], .*both \[4, 5\] \(trajectories, response tok"),
        ("advantages_alone", r"returned a tensor \[4, 5\]; it must return \(advantages, returns\)"),
        ("wants_more", r"needs teacher_logprobs, which is not offered"),
        ("of_two_minds", r"names batch of ours, which are flat, and token_level_rewards of SkyRL's"),
        ("divides_by_zero", r"divides_by_zero returned advantages that are not finite"),
        ("nobody_awaits", r"is written with `async def`"),
        ("other_names", r"needs scores, mask, which is not offered"),
        ("complex_numbers", r"both \[4, 5\]"),
        ("ragged", r"both \[4, 5\]"),
        (
            "breaks",
            rf"estimator {HERE}.breaks fails on a small batch: RuntimeError: .*test_estimators.py:\d+ in breaks",
        ),
        ("leaves", r"leaves fails on a small batch: SystemExit: 3"),
        ("lacks_a_key", r"lacks_a_key fails on a small batch: KeyError: 'x'"),
        ("yields", r"returned generator; it must return"),
        ("LATER", r"Later object at .* is written with `async def`"),
        ("RANGE", r"has no parameters that can be read"),
        ("missing", r"cannot be imported: .*module .* has no missing"),
        ("HERE", r"is of type str, and no function"),
    ],
)
def test_a_wrong_estimator_is_found_by_a_call_at_start_up(name, says):
    with pytest.raises(WrongFunction, match=says):
        check_estimator(AlgorithmConfig(advantage_estimator=f"{HERE}:{name}"))


def zeros(token_level_rewards, response_mask, index):
    return token_level_rewards * 0, token_level_rewards


def test_an_estimator_that_gives_zeros_alone_is_warned_of():
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    check_estimator(AlgorithmConfig(advantage_estimator=f"{HERE}:zeros"))
    check_estimator(AlgorithmConfig(advantage_estimator=f"{HERE}:simple_baseline"))
    logger.remove(sink)
    assert len(said) == 1
    assert f"{HERE}.zeros returned zeros alone" in said[0]
