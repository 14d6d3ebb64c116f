"""Episodes and their collector: typed ends, fair groups, retries, deadlines, and nothing left open."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.batch.samples import to_samples
from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.types import EpisodeEnd, Prompt
from tests.fakes import CountdownEnv, FewSessionsEnv, FlakyEnv, ScriptedEngine
from tests.tiny_models import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=5, max_input_length=400, max_context=512, step_timeout_s=60, episode_timeout_s=300)
SAMPLING = SamplingParams(max_tokens=20)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _environments():
    register("countdown", CountdownEnv)
    register("flaky", FlakyEnv)
    register("few_sessions", FewSessionsEnv)
    FlakyEnv.attempts.clear()
    CountdownEnv.live = 0
    yield
    skyrl_gym.envs.deregister("countdown")
    skyrl_gym.envs.deregister("flaky")
    skyrl_gym.envs.deregister("few_sessions")
    assert CountdownEnv.live == 0, "an environment was not closed"


def countdown_prompts(*starts: int, **extras) -> list[Prompt]:
    messages = [{"role": "user", "content": "count"}]
    return [Prompt(str(i), messages, "countdown", {"start": start, **extras}) for i, start in enumerate(starts)]


def flaky(name: str, breaks: int, how: str = "failure") -> Prompt:
    extras = {"start": 1, "breaks": breaks, "how": how, "name": name}
    return Prompt(name, [{"role": "user", "content": "count"}], "flaky", extras)


class CountsDown:
    """Replies with the right next number: it reads the last "n left" from the history, starting from 3."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, request) -> str:
        text = self.tokenizer.decode(request.prompt_ids)
        said = [int(line.split()[0]) for line in text.splitlines() if " left" in line]
        return str((said[-1] if said else 3) - 1)


def play(prompts, reply, tokenizer, *, n=1, limits=LIMITS, sampling=SAMPLING, **kwargs):
    engine = ScriptedEngine(tokenizer, reply)
    collector = Collector(engine, ChatTemplate(tokenizer), limits, env_configs={}, **kwargs)
    groups = asyncio.run(collector.collect(Round("train", 1, prompts, n, sampling)))
    collector.close()
    return groups, engine


def test_an_episode_of_three_turns_earns_three_rewards_and_becomes_one_sample(tokenizer):
    groups, engine = play(countdown_prompts(3), CountsDown(tokenizer), tokenizer)
    (trajectory,) = groups[0].trajectories
    assert [turn.text for turn in trajectory.turns] == ["2", "1", "0"]
    assert trajectory.reward == 3.0
    assert trajectory.end is EpisodeEnd.FINISHED
    assert engine.forgotten == ["train_1_0_0_0"]
    (sample,) = to_samples([trajectory])
    sampled = [token for token, mask in zip(sample.input_ids, sample.loss_mask, strict=True) if mask]
    assert tokenizer.decode(sampled) == "2<|im_end|>1<|im_end|>0<|im_end|>"


def test_the_turn_limit_and_the_token_limits_are_told_apart(tokenizer):
    groups, _ = play(countdown_prompts(9), lambda request: "?", tokenizer)
    assert groups[0].trajectories[0].end is EpisodeEnd.OUT_OF_TURNS
    groups, _ = play(countdown_prompts(9), lambda request: "x" * 99, tokenizer)
    assert groups[0].trajectories[0].end is EpisodeEnd.OUT_OF_TOKENS
    limits = EpisodeLimits(5, max_input_length=5, max_context=512, step_timeout_s=60, episode_timeout_s=300)
    groups, engine = play(countdown_prompts(9), lambda request: "?", tokenizer, limits=limits)
    assert groups[0].trajectories[0].end is EpisodeEnd.OUT_OF_TOKENS
    assert groups[0].trajectories[0].turns == []
    assert engine.requests == []


def test_the_environment_says_what_running_out_of_tokens_between_turns_costs(tokenizer):
    one_turn = len(ChatTemplate(tokenizer).start(countdown_prompts(3)[0].messages).ids)
    limits = EpisodeLimits(5, max_input_length=one_turn, max_context=512, step_timeout_s=60, episode_timeout_s=300)
    groups, _ = play(countdown_prompts(3), CountsDown(tokenizer), tokenizer, limits=limits)
    (trajectory,) = groups[0].trajectories
    assert (trajectory.end, len(trajectory.turns)) == (EpisodeEnd.OUT_OF_TOKENS, 1)
    assert trajectory.reward == 1.0 - 0.25


def test_a_reply_never_outgrows_the_context(tokenizer):
    limits = EpisodeLimits(1, max_input_length=400, max_context=70, step_timeout_s=60, episode_timeout_s=300)
    _, engine = play(
        countdown_prompts(3), lambda r: "x" * 99, tokenizer, limits=limits, sampling=SamplingParams(max_tokens=60)
    )
    request = engine.requests[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens == 70


def test_a_group_shares_the_environment_seed_but_not_the_sampling_seed(tokenizer):
    groups, engine = play(countdown_prompts(3, 3), lambda request: "2", tokenizer, n=4)
    seeds = [{trajectory.env_metrics["seed"] for trajectory in group.trajectories} for group in groups]
    assert [len(seen) for seen in seeds] == [1, 1]
    assert seeds[0] != seeds[1]
    first_turns = [request.sampling.seed for request in engine.requests[:8]]
    assert len(set(first_turns)) == 8


def test_the_rows_own_turn_limit_and_seed_win(tokenizer):
    groups, _ = play(countdown_prompts(9, max_turns=2, seed=7), lambda request: "?", tokenizer)
    (trajectory,) = groups[0].trajectories
    assert len(trajectory.turns) == 2
    assert trajectory.seed == trajectory.env_metrics["seed"] == 7


def test_null_for_the_turn_limit_and_the_seed_means_not_given(tokenizer):
    groups, _ = play(countdown_prompts(9, max_turns=None, seed=None), lambda request: "?", tokenizer)
    (trajectory,) = groups[0].trajectories
    assert len(trajectory.turns) == LIMITS.max_turns
    assert trajectory.seed == trajectory.env_metrics["seed"] is not None


@pytest.mark.parametrize("how", ["failure", "unlucky"])
def test_a_broken_environment_is_retried_with_the_same_seed_and_counted(tokenizer, how):
    groups, _ = play([flaky("a", 2, how), flaky("b", 0)], lambda request: "0", tokenizer)
    first, second = groups[0].trajectories[0], groups[1].trajectories[0]
    assert (first.num_attempts, first.reward, first.end) == (3, 1.0, EpisodeEnd.FINISHED)
    assert second.num_attempts == 1
    assert first.env_metrics["seed"] == first.seed


def test_an_environment_that_stays_broken_is_no_reward_and_no_sample(tokenizer):
    groups, _ = play([flaky("a", 99, "bug"), flaky("b", 0)], lambda request: "0", tokenizer)
    (trajectory,) = groups[0].trajectories
    assert trajectory.end is EpisodeEnd.ENV_FAILURE
    assert "a bug in the environment" in trajectory.failure
    assert to_samples([trajectory]) == []


def test_a_round_in_which_everything_fails_ends_with_the_reason(tokenizer):
    with pytest.raises(EveryEpisodeFailed, match="the server is gone"):
        play([flaky("a", 99), flaky("b", 99)], lambda request: "0", tokenizer)


def test_a_hanging_environment_fails_at_its_deadline(tokenizer):
    limits = EpisodeLimits(5, 400, 512, step_timeout_s=5.0, episode_timeout_s=300)
    groups, _ = play([flaky("a", 1, "hang"), flaky("b", 0)], lambda r: "0", tokenizer, limits=limits)
    assert groups[0].trajectories[0].num_attempts == 2
    assert groups[0].trajectories[0].reward == 1.0


def test_an_engine_that_breaks_ends_the_round_and_closes_every_environment(tokenizer):
    def breaks(request):
        raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        play(countdown_prompts(3, 3), breaks, tokenizer)


def test_results_keep_the_order_of_the_prompts(tokenizer):
    groups, _ = play(countdown_prompts(3, 1, 2), lambda request: "0", tokenizer, n=2)
    assert [group.prompt.uid for group in groups] == ["0", "1", "2"]
    assert [t.repetition for group in groups for t in group.trajectories] == [0, 1] * 3


def test_deterministic_rollouts_submit_each_round_in_one_order(tokenizer):
    _, engine = play(countdown_prompts(3, 3, 3), CountsDown(tokenizer), tokenizer, n=2, deterministic=True)
    sessions = [request.session_id for request in engine.requests]
    assert sessions == [f"train_1_{prompt}_{repetition}_0" for prompt in range(3) for repetition in range(2)] * 3


def test_deterministic_rollouts_go_on_with_fewer_sessions_than_episodes(tokenizer):
    # Two sessions. 0 and 2 take 3 turns; 1 and 3 begin with a wrong "2", then count down from 1 and 2: 2 and 3 turns.
    together = ["01", "01", "02", "23", "23", "3"]
    prompts = [replace(prompt, env_class="few_sessions") for prompt in countdown_prompts(3, 1, 3, 2)]
    for _ in range(5):
        _, engine = play(prompts, CountsDown(tokenizer), tokenizer, deterministic=True)
        sessions = [request.session_id.split("_")[2] for request in engine.requests]
        assert sessions == list("".join(together))
        assert FewSessionsEnv.free == 2
