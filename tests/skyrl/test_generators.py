"""Generators of SkyRL's users: ids, masks and logprobs go over one to one, and what cannot be trained on is refused."""

from __future__ import annotations

import asyncio
import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from loguru import logger
from omegaconf import OmegaConf

from skyrl_gym.envs import deregister, register
from skyrl_train.batch.samples import to_samples
from skyrl_train.config import load_config
from skyrl_train.engine.base import SamplingParams
from skyrl_train.generators import GeneratorInput, GeneratorInterface, GeneratorOutput, TrajectoryID
from skyrl_train.generators.custom_generator import GeneratorCollector
from skyrl_train.generators.generator_output import WrongOutput, check_output, output_of, with_output
from skyrl_train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl_train.generators.users_tokenizer import users_tokenizer
from skyrl_train.generators.utils import (
    get_response_ids_and_loss_mask_from_messages,
    get_rollout_metrics,
    prepare_generator_input,
)
from skyrl_train.inference_engines.base import InferenceEngineInput
from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.filters import zero_reward_on_non_stop
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.types import EpisodeEnd, Group, Prompt
from tests.fakes import CountdownEnv, FlakyEnv, ScriptedEngine
from tests.tiny_models import tiny_tokenizer

PROMPTS = [Prompt(str(i), [{"role": "user", "content": f"task {i}"}], "mine", {"i": i}) for i in range(2)]


class SingleTurn(GeneratorInterface):
    """A generator as in SkyRL's documentation: one engine request per prompt; a longer reply has a higher reward."""

    def __init__(self, client: InferenceEngineClient, tokenizer: Any) -> None:
        self.client, self.tokenizer = client, tokenizer
        self.seen: list[GeneratorInput] = []

    async def generate(self, input_batch: GeneratorInput) -> GeneratorOutput:
        self.seen.append(input_batch)
        prompt_ids = [self.client.template.encode(p, add_generation_prompt=True) for p in input_batch["prompts"]]
        ids = [trajectory.to_string() for trajectory in input_batch.get("trajectory_ids") or []]
        engine_input: InferenceEngineInput = {
            "prompt_token_ids": prompt_ids,
            "session_ids": ids,
            "sampling_params": input_batch["sampling_params"],
        }
        out = await self.client.generate(engine_input)
        return {
            "prompt_token_ids": prompt_ids,
            "response_ids": out["response_ids"],
            "rewards": [float(len(response)) for response in out["responses"]],
            "loss_masks": [[1] * len(response) for response in out["response_ids"]],
            "stop_reasons": out["stop_reasons"],
            "rollout_metrics": {"mine/calls": 1, "mine/words": "not a number"},
            "rollout_logprobs": out["response_logprobs"],
        }


class Fixed(GeneratorInterface):
    """Returns what it is told."""

    def __init__(self, output: Any) -> None:
        self.output = output

    async def generate(self, input_batch: GeneratorInput) -> GeneratorOutput:
        return self.output


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def client_for(tokenizer: Any) -> InferenceEngineClient:
    engine = ScriptedEngine(tokenizer, lambda request: "yes" * (1 + len(request.prompt_ids) % 2))
    return InferenceEngineClient(engine, ChatTemplate(tokenizer), max_model_len=128, seed=1)


def collect(generator: GeneratorInterface, client: InferenceEngineClient, n: int = 2, **kwargs: Any) -> list[Group]:
    asked = Round("train", 3, PROMPTS, n, SamplingParams(max_tokens=9, temperature=0.5, stop=("x",)))
    return asyncio.run(GeneratorCollector(generator, client, **kwargs).collect(asked))


def output(**changes: Any) -> dict[str, Any]:
    """Two entries: [5 6 | 7 observed | 8] paid 1 and 2 at its turns, and [9 2], the end of sequence added."""
    whole = {
        "prompt_token_ids": [[1, 2], [1, 3]],
        "response_ids": [[5, 6, 7, 8], [9, 2]],
        "rewards": [[0.0, 1.0, 0.0, 2.0], [0.0, 4.0]],
        "loss_masks": [[1, 1, 0, 1], [1, 0]],
        "stop_reasons": ["stop", "length"],
        "rollout_logprobs": [[-0.1, -0.2, 0.0, -0.3], [-0.4, 0.0]],
    }
    return {**whole, **changes}


def test_what_the_engine_sampled_is_what_is_trained(tokenizer):
    client = client_for(tokenizer)
    generator = SingleTurn(client, tokenizer)
    groups = collect(generator, client)
    [seen] = generator.seen
    assert seen["env_extras"] == [{"i": 0}, {"i": 0}, {"i": 1}, {"i": 1}]
    assert seen.get("trajectory_ids") == [TrajectoryID(str(i), k) for i in range(2) for k in range(2)]
    assert seen["sampling_params"] is not None
    assert {"max_tokens": 9, "temperature": 0.5, "stop": ["x"]}.items() <= seen["sampling_params"].items()
    engine: Any = client.engine
    requests = engine.requests
    assert [len(requests), len({request.sampling.seed for request in requests})] == [4, 4]
    assert sorted(engine.forgotten) == [f"train_3_custom_{i}_{k}" for i in range(2) for k in range(2)]
    samples = to_samples([trajectory for group in groups for trajectory in group.trajectories])
    assert [sample.group_id for sample in samples] == ["0", "0", "1", "1"]
    assert len({sample.trajectory_id for sample in samples}) == 4
    for sample, request, completion in zip(samples, requests, engine.completions, strict=True):
        n = sample.num_prompt_tokens
        assert sample.input_ids[:n] == request.prompt_ids
        assert sample.rollout_logprobs[n:] == completion.logprobs
        assert all(sample.loss_mask[n:])
        assert sample.rewards[-1] == len(tokenizer.decode(sample.input_ids[n:], skip_special_tokens=True))


def test_masks_rewards_and_logprobs_go_over_one_to_one(tokenizer):
    groups = collect(Fixed(output()), client_for(tokenizer), n=1)
    first, second = (group.trajectories[0] for group in groups)
    [sample], [other] = to_samples([first]), to_samples([second])
    assert sample.input_ids == [1, 2, 5, 6, 7, 8]
    assert sample.loss_mask == [False, False, True, True, False, True]
    assert sample.rewards == [0.0, 0.0, 0.0, 1.0, 0.0, 2.0]
    assert sample.rollout_logprobs == [0.0, 0.0, -0.1, -0.2, 0.0, -0.3]
    assert other.rewards == [0.0, 0.0, 4.0, 0.0]  # the reward of a token that nobody sampled moves to the one before
    assert [(turn.response_ids, turn.reward) for turn in first.turns] == [([5, 6], 1.0), ([8], 2.0)]
    assert (first.end, second.end) == (EpisodeEnd.FINISHED, EpisodeEnd.OUT_OF_TOKENS)
    assert (first.reward, second.reward) == (3.0, 4.0)
    assert to_samples([zero_reward_on_non_stop(second)])[0].rewards == [0.0] * 4


def test_the_output_of_groups_is_the_output_they_were_made_of(tokenizer):
    given = output()
    back, uids = output_of(collect(Fixed(given), client_for(tokenizer), n=1), one_reward=False)
    assert uids == ["0", "1"]
    for name in ("prompt_token_ids", "response_ids", "loss_masks", "rollout_logprobs", "stop_reasons"):
        assert back[name] == given[name]
    assert back["rewards"][0] == given["rewards"][0]
    assert output_of(collect(Fixed(given), client_for(tokenizer), n=1), one_reward=True)[0]["rewards"] == [3.0, 4.0]


def step_wise(**changes: Any) -> Any:
    """Two episodes: of three turns, of which the second goes on from the first and the third does not, and of one."""
    return {
        "prompt_token_ids": [[1], [1, 5, 7], [1, 6], [1]],
        "response_ids": [[5, 9], [6], [4], [8]],  # 9: an observation, which the next prompt prints as 7
        "rewards": [[1.0, 0.0], [2.0], [4.0], [0.5]],
        "loss_masks": [[1, 0], [1], [1], [1]],
        "trajectory_ids": [*[TrajectoryID("0", 0)] * 3, TrajectoryID("1", 0)],
        "is_last_step": [False, False, True, True],
        "stop_reasons": ["stop"] * 4,
        "rollout_logprobs": None,
        **changes,
    }


def test_turns_given_apart_are_joined_where_the_next_goes_on(tokenizer):
    groups = collect(Fixed(step_wise()), client_for(tokenizer), n=1)
    joined, rewritten, other = to_samples([group.trajectories[0] for group in groups])
    assert (joined.input_ids, joined.rewards) == ([1, 5, 7, 6], [0.0, 1.0, 0.0, 2.0])
    assert (rewritten.input_ids, rewritten.rewards) == ([1, 6, 4], [0.0, 0.0, 4.0])
    assert [sample.trajectory_id for sample in (joined, rewritten, other)] == ["0_0", "0_0", "1_0"]
    assert [group.trajectories[0].reward for group in groups] == [7.0, 0.5]  # the turns add up
    assert math.isnan(joined.rollout_logprobs[-1])  # none were given


def test_step_wise_output_is_an_entry_per_turn_and_goes_back_into_joined_samples(tokenizer):
    groups = collect(Fixed(step_wise()), client_for(tokenizer), n=1)
    entries, uids = output_of(groups, one_reward=False, step_wise=True)
    assert uids == ["0", "0", "0", "1"]
    assert entries["is_last_step"] == [False, False, True, True]
    assert entries["prompt_token_ids"] == step_wise()["prompt_token_ids"]
    assert entries["response_ids"] == [[5, 7], [6], [4], [8]]
    assert entries["rewards"] == [[1.0, 0.0], [2.0], [4.0], [0.5]]
    check_output(entries, 2)
    entries["rewards"] = [[1.0, 0.0], [3.0], [4.0], [0.5]]
    entries["loss_masks"][0] = [0, 0]
    changed = with_output(groups, entries, step_wise=True)
    joined, rewritten, _ = to_samples([group.trajectories[0] for group in changed])
    assert (joined.loss_mask, joined.rewards) == ([False, False, False, True], [0.0, 1.0, 0.0, 3.0])
    assert changed[0].trajectories[0].reward == sum(joined.rewards) + sum(rewritten.rewards) == 8.0
    one_turn_each = collect(Fixed(output()), client_for(tokenizer), n=1)
    assert output_of(one_turn_each, one_reward=False)[0]["is_last_step"] is None


def test_a_reward_repeated_at_every_turn_is_warned_of_once(tokenizer):
    said: list[str] = []
    handler = logger.add(said.append, level="WARNING", format="{message}")
    asked = Round("train", 3, PROMPTS, 1, SamplingParams(max_tokens=9))
    for rewards, num_warnings in (([[2.0, 0.0], [2.0], [2.0], [0.5]], 1), (step_wise()["rewards"], 0)):
        collector = GeneratorCollector(Fixed(step_wise(rewards=rewards)), client_for(tokenizer))
        for _ in range(2):
            asyncio.run(collector.collect(asked))
        assert len([words for words in said if "added up" in words]) == num_warnings
        said.clear()
    logger.remove(handler)


def test_an_episode_that_its_environment_broke_is_nobodys_reward(tokenizer):
    groups = collect(Fixed(output(stop_reasons=["env_failure", "stop"])), client_for(tokenizer), n=1)
    assert groups[0].trajectories[0].end is EpisodeEnd.ENV_FAILURE
    assert to_samples(groups[0].trajectories) == []
    with pytest.raises(EveryEpisodeFailed):
        collect(Fixed(output(stop_reasons=["env_failure"] * 2)), client_for(tokenizer), n=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"response_ids": None}, "lacks the lists response_ids"),
        ({"response_ids": [[5, 6, 7, 8]]}, "returned 1 response_ids but 2 prompt_token_ids"),
        ({"rewards": [1.0, [2.0]]}, "mixed rewards per response with rewards per token"),
        ({"rewards": [[1.0], [2.0, 0.0]]}, "entry 0 has 4 response_ids but 1 rewards"),
        ({"loss_masks": [[1, 1, 0, 1], [1]]}, "entry 1 has 2 response_ids but 1 loss_masks"),
        ({"loss_masks": [[1, 1, 0, 2], [1, 1]]}, "entry 0: loss_masks must be 0 or 1"),
        ({"rollout_logprobs": [[-0.1], [0.0, 0.0]]}, "entry 0 has 4 response_ids but 1 rollout_logprobs"),
        ({"rewards": [1.0, float("nan")]}, "entry 1: rewards and logprobs must be finite"),
        ({"response_ids": [[5, 6, 7, 8], []]}, "entry 1 has an empty prompt or response"),
        ({"response_ids": [[5, 6, 7, "8"], [9, 2]]}, "entry 0: token ids must be whole numbers"),
        ({"is_last_step": [True, False]}, "was given 2 prompts and returned 1 episodes"),
        ({"is_last_step": [True, True]}, "needs trajectory_ids"),
        (step_wise(is_last_step=[True, False, False, True]), "entry 1 belongs to .*'0', repetition_id=0.* to .*'1'"),
        (step_wise(is_last_step=[True, False, True, False]), "the last entry of an output with is_last_step must end"),
    ],
)
def test_an_output_that_cannot_be_trained_on_is_refused_with_the_entry(tokenizer, changes, says):
    with pytest.raises(WrongOutput, match=says):
        collect(Fixed(output(**changes)), client_for(tokenizer), n=1)


def test_arrays_tensors_and_tuples_are_read_as_lists(tokenizer):
    given = output()
    plain = collect(Fixed(given), client_for(tokenizer), n=1)
    changed = output(
        prompt_token_ids=np.array(given["prompt_token_ids"]),
        response_ids=(torch.tensor(given["response_ids"][0]), tuple(np.array(given["response_ids"][1]))),
        rewards=[np.array(reward, dtype=np.float32) for reward in given["rewards"]],
        loss_masks=[torch.tensor(mask).bool() for mask in given["loss_masks"]],
        rollout_logprobs=[np.array(x) for x in given["rollout_logprobs"]],
    )
    assert collect(Fixed(changed), client_for(tokenizer), n=1) == plain
    one_each = output(rewards=[np.float32(3.0), np.float64(4.0)])
    assert [group.trajectories[0].reward for group in collect(Fixed(one_each), client_for(tokenizer), n=1)] == [3, 4]


def test_off_policy_correction_needs_the_engines_logprobs(tokenizer):
    with pytest.raises(WrongOutput, match="the generator returned none"):
        collect(Fixed(output(rollout_logprobs=None)), client_for(tokenizer), n=1, needs_logprobs=True)


@pytest.mark.parametrize(
    ("key", "needs"),
    [
        ("policy_loss_type=regular", False),
        ("policy_loss_type=dppo", True),
        ("policy_loss_type=rollout_is", True),
        ("off_policy_correction.tis_ratio_type=token", True),
    ],
)
def test_what_compares_with_the_engine_needs_its_logprobs_of_a_generator(key, needs):
    cfg = load_config([f"trainer.algorithm.{key}"])
    assert cfg.trainer.algorithm.needs_rollout_logprobs is needs


def test_too_few_episodes_are_refused(tokenizer):
    with pytest.raises(WrongOutput, match="was given 4 prompts and returned 2 episodes"):
        collect(Fixed(output()), client_for(tokenizer), n=2)


def test_messages_become_ids_and_masks(tokenizer):
    messages = [
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "no"},
    ]
    ids, mask, logprobs = get_response_ids_and_loss_mask_from_messages(messages, tokenizer)
    assert tokenizer.decode(ids) == (
        "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    )
    trained = [token for token, bit in zip(ids, mask, strict=True) if bit]
    assert tokenizer.decode(trained) == "hi<|im_end|>no<|im_end|>"
    assert logprobs is None
    given = [[-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6]]
    _, _, logprobs = get_response_ids_and_loss_mask_from_messages(messages, tokenizer, given)
    assert logprobs is not None
    assert [x for x, bit in zip(logprobs, mask, strict=True) if bit] == given[0] + given[1]
    assert all(x == 0 for x, bit in zip(logprobs, mask, strict=True) if not bit)
    with pytest.raises(AssertionError):
        get_response_ids_and_loss_mask_from_messages([], tokenizer)
    for wrong in ([[-0.1]], [[-0.1], [-0.2]]):
        with pytest.raises(ValueError, match="logprobs"):
            get_response_ids_and_loss_mask_from_messages(messages, tokenizer, wrong)
    with pytest.raises(ValueError, match="not role 'tool'"):
        get_response_ids_and_loss_mask_from_messages([{"role": "tool", "content": "x"}], tokenizer)


def test_a_chat_templates_tokens_are_a_list_as_code_for_skyrl_expects(tokenizer):
    given = users_tokenizer(tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    text = given.apply_chat_template(messages, tokenize=False)
    ids = given.apply_chat_template(messages, add_generation_prompt=False, tokenize=True)
    assert ids == given.apply_chat_template(messages, return_dict=True)["input_ids"] == tokenizer.encode(text)
    assert given.apply_chat_template(messages) == copy.deepcopy(given).apply_chat_template(messages)
    assert given.decode(ids) == text
    assert type(tokenizer.apply_chat_template(messages)) is not list  # the run's own is as transformers made it


def test_the_input_of_a_batch_and_its_metrics():
    rows = [{"prompt": [], "env_class": None, "env_extras": {"a": 1}, "uid": 7}]
    given, uids = prepare_generator_input(rows, 2, {"max_tokens": 3}, "gsm8k", "train", 5)
    assert (uids, given["env_classes"]) == (["7", "7"], ["gsm8k", "gsm8k"])
    metrics = get_rollout_metrics([[1], [1, 2, 3]], [[0.0], [0.0, 0.0, 1.0]])
    assert metrics["generate/avg_num_tokens"] == 2.0
    assert metrics["generate/avg_tokens_non_zero_rewards"] == 3.0
    assert metrics["generate/avg_tokens_zero_rewards"] == 1.0


def test_a_sampling_parameter_that_the_engine_lacks_is_refused(tokenizer):
    client = client_for(tokenizer)
    with pytest.raises(ValueError, match="sampling_params presence_penalty are unknown"):
        asyncio.run(client.generate({"prompt_token_ids": [[1]], "sampling_params": {"presence_penalty": 1}}))
    for wrong in ({}, {"prompts": [], "prompt_token_ids": []}):
        with pytest.raises(ValueError, match="exactly one of"):
            asyncio.run(client.generate(wrong))  # ty: ignore[invalid-argument-type]


def test_skyrls_own_generator_plays_environments_and_groups_are_fair(tokenizer):
    register("countdown", CountdownEnv)
    register("flaky", FlakyEnv)
    try:
        engine = ScriptedEngine(tokenizer, lambda request: "2")
        client = InferenceEngineClient(engine, ChatTemplate(tokenizer), max_model_len=200, seed=1)
        config = load_config(["generator.max_turns=2", "generator.max_env_retries=0", "trainer.max_prompt_length=100"])
        generator = SkyRLGymGenerator(config.generator, config.environment.skyrl_gym, client, tokenizer, "m")
        prompts = [
            Prompt("a", [{"role": "user", "content": "count"}], "countdown", {"start": 3}),
            Prompt(
                "b",
                [{"role": "user", "content": "count"}],
                "flaky",
                {"start": 1, "breaks": 9, "how": "failure", "name": "b"},
            ),
        ]
        asked = Round("train", 3, prompts, 2, SamplingParams(max_tokens=9))
        groups = asyncio.run(GeneratorCollector(Talking(generator), client).collect(asked))
        generator.close()
    finally:
        deregister("countdown")
        deregister("flaky")
    first, second = groups
    assert [t.reward for t in first.trajectories] == [1.0, 1.0]
    [sample] = to_samples(first.trajectories[:1])
    assert tokenizer.decode([i for i, bit in zip(sample.input_ids, sample.loss_mask, strict=True) if bit]) == (
        "2<|im_end|>2<|im_end|>"
    )
    assert [t.end for t in second.trajectories] == [EpisodeEnd.ENV_FAILURE] * 2
    for name in ("agent_loop", "get_obs_ids_from_obs"):
        mine: Any = type("Mine", (SkyRLGymGenerator,), {name: None})
        with pytest.raises(ValueError, match=f"{name} is never called"):
            mine(config.generator, None, client, tokenizer)


class Talking(GeneratorInterface):
    """Calls SkyRL's generator with its second argument."""

    def __init__(self, generator: SkyRLGymGenerator) -> None:
        self.generator = generator

    async def generate(self, input_batch: GeneratorInput) -> GeneratorOutput:
        return await self.generator.generate(input_batch, disable_tqdm=True)


class Configured(CountdownEnv):
    """Counts down from what its configuration says."""

    def __init__(self, env_config, extras):
        super().__init__(env_config, {**extras, "start": env_config.start})


@pytest.mark.parametrize("kind", [OmegaConf.create, dict])
def test_skyrls_own_generator_takes_sections_of_hydra(tokenizer, kind):
    register("configured", Configured)
    try:
        engine = ScriptedEngine(tokenizer, lambda request: "2")
        client = InferenceEngineClient(engine, ChatTemplate(tokenizer), max_model_len=200, seed=1)
        generator_cfg = kind({"max_turns": 3, "sampling_params": {"temperature": 0.5}, "max_input_length": 100})
        generator = SkyRLGymGenerator(generator_cfg, kind({"configured": {"start": 3}}), client, tokenizer, "m")
        assert generator.generator_cfg.sampling_params.temperature == 0.5
        prompts = [Prompt("a", [{"role": "user", "content": "count"}], "configured", {})]
        [group] = asyncio.run(
            GeneratorCollector(generator, client).collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=9)))
        )
        generator.close()
    finally:
        deregister("configured")
    assert (group.trajectories[0].reward, len(group.trajectories[0].turns)) == (1.0, 3)  # "2" is right once
