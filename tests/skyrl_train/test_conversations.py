"""Conversations to imitate: the tokens that an episode with the same words would train, and rows that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.batch.samples import to_samples
from skyrl_train.config import SFTConfig
from skyrl_train.conversations import Conversations, read_conversations, row_conversation, sample_of
from skyrl_train.engine.base import SamplingParams
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.prompts import DataError
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import Message, Prompt
from tests.fakes import CountdownEnv, ScriptedEngine
from tests.skyrl_train.batches import random_batch
from tests.skyrl_train.learner.test_learner import trainer_config
from tests.tiny_models import tiny_policy, tiny_tokenizer

ASKED: list[Message] = [{"role": "user", "content": "a"}]
SAID: Message = {"role": "assistant", "content": "b"}
PROMPT: list[Message] = [{"role": "user", "content": "count"}]
LIMITS = EpisodeLimits(max_turns=5, max_input_length=400, max_context=512, step_timeout_s=60, episode_timeout_s=300)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _countdown() -> Iterator[None]:
    register("countdown", CountdownEnv)
    yield
    skyrl_gym.envs.deregister("countdown")


@pytest.mark.parametrize("one_message", [False, True])
def test_a_conversation_is_trained_as_an_episode_with_the_same_words(tokenizer, one_message):
    """From 3 the policy says 2, 1, 0, and reads "2 left", "1 left" in between."""
    template = ChatTemplate(tokenizer, one_message=one_message)
    said = iter("210")
    engine = ScriptedEngine(tokenizer, lambda request: next(said))
    collector = Collector(engine, template, LIMITS, env_configs=lambda _: {}, max_env_workers=0, max_retries=0, seed=1)
    prompts = [Prompt("0", PROMPT, "countdown", {"start": 3})]
    [group] = asyncio.run(collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=20))))
    collector.close()
    [played] = to_samples(group.trajectories)
    messages = list(PROMPT)
    for reply, answer in (("2", "2 left"), ("1", "1 left"), ("0", None)):
        messages.append({"role": "assistant", "content": reply})
        messages += [{"role": "user", "content": answer}] if answer else []
    shown = sample_of(messages, template, "row 0")
    assert shown.input_ids == played.input_ids
    assert shown.loss_mask == played.loss_mask
    assert shown.num_prompt_tokens == played.num_prompt_tokens
    trained = [token for token, is_said in zip(shown.input_ids, shown.loss_mask, strict=True) if is_said]
    assert tokenizer.decode(trained) == ("210<|im_end|>" if one_message else "2<|im_end|>1<|im_end|>0<|im_end|>")


def test_a_row_may_have_messages_or_prompt_and_response(tokenizer):
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert row_conversation("row 0", {"messages": expected}) == expected
    assert row_conversation("row 0", {"prompt": "a", "response": "b"}) == expected
    assert row_conversation("row 0", {"prompt": expected[:1], "response": "b", "more": 1}) == expected
    empty = {"tools": [], "prompt": None, "response": None}  # columns of a file in which other rows have them
    assert (
        row_conversation("row 0", {"messages": [ASKED[0], {**SAID, "tool_calls": []}], **empty})[-1]["content"] == "b"
    )
    assert row_conversation("row 0", {"messages": None, "prompt": "a", "response": "b", "tools": None}) == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "row 0 (trainer.sft.data) has no"),
        ("a", "it has a str"),
        ({"prompt": "a", "response": 3}, "response must be a text, got '3'"),
        ({"prompt": [], "response": "b"}, "prompt must be a text, or a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages must be a text, or a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "end with the assistant's, got user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begin with a prompt"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "response": "b"}, "begin with a prompt"),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "assistant")]},
            "two messages of the assistant follow each other",
        ),
        ({"prompt": "a", "response": "\ud800"}, "response: "),
        ({"messages": [*ASKED, {**SAID, "tool_calls": [{"function": {"name": "f"}}]}]}, "assistant has tool_calls"),
        ({"messages": [*ASKED, {**SAID, "reasoning_content": "so"}]}, "assistant has reasoning_content"),
        ({"messages": [*ASKED, {**SAID, "weight": 0}]}, "assistant has weight, and only its content is imitated"),
        ({"messages": [*ASKED, SAID], "tools": [{"type": "function"}]}, "tools would not be shown to the model"),
        ({"messages": None}, "(trainer.sft.data) has no"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row, says):
    with pytest.raises(DataError, match="row 0") as refused:
        row_conversation("row 0", row)
    assert says in str(refused.value)


def test_long_conversations_are_dropped_and_counted_and_none_left_is_an_error(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "response": "b" * size}) + "\n" for size in (1, 50)))
    template = ChatTemplate(tokenizer)
    assert len(read_conversations([str(path)], template, 100)) == 2
    assert len(read_conversations([str(path)], template, 45)) == 1
    with pytest.raises(DataError, match="the shortest has 22 tokens, 10 fit"):
        read_conversations([str(path)], template, 10)


def test_every_conversation_is_trained_once_an_epoch_in_another_order(tokenizer):
    template = ChatTemplate(tokenizer)
    samples = [sample_of([*PROMPT, {"role": "assistant", "content": str(i)}], template, f"row {i}") for i in range(5)]
    conversations = Conversations(samples, batch_size=2, epochs=2, seed=3)
    assert conversations.num_steps == 6
    assert [conversations.batch(step).num_samples for step in range(1, 7)] == [2, 2, 1, 2, 2, 1]
    rows = [
        [ids.tolist() for step in steps for ids in conversations.batch(step).input_ids.split(samples_length(samples))]
        for steps in ((1, 2, 3), (4, 5, 6))
    ]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(sample.input_ids for sample in samples)
    assert rows[0] != rows[1]


def samples_length(samples) -> int:
    [length] = {len(sample.input_ids) for sample in samples}
    return length


@pytest.mark.parametrize("limits", [{}, {"micro_train_batch_size_per_gpu": 1}])
def test_a_step_has_the_loss_and_the_gradient_of_plain_transformers(tokenizer, limits, monkeypatch):
    template = ChatTemplate(tokenizer)
    texts = ["yes", "no, never"]
    samples = [sample_of([*PROMPT, {"role": "assistant", "content": text}], template, text) for text in texts]
    batch = Conversations(samples, batch_size=2, epochs=1, seed=0).batch(1)
    learner = TorchLearner(tiny_policy(), trainer_config(**limits), num_training_steps=1, temperature=0.5)
    caught = {}

    def catch(learning_rate):
        weights = learner.policy.module.named_parameters()
        caught.update({name: weight.grad.clone() for name, weight in weights if weight.grad is not None})
        return original(learning_rate)

    original = learner._optimizer.step
    monkeypatch.setattr(learner._optimizer, "step", catch)
    metrics = learner.imitate(batch)

    policy, total, count = tiny_policy(), torch.zeros(()), 0
    policy.module.set_attn_implementation("eager")
    for sample in samples:
        ids = batch.input_ids.new_tensor(sample.input_ids)
        logprobs = policy.module(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        mask = batch.loss_mask.new_tensor(sample.loss_mask)[1:]
        total = total - logprobs.gather(1, ids[1:, None])[:, 0][mask].sum()
        count += int(mask.sum())
    loss = total / count
    loss.backward()
    assert metrics["sft/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["sft/num_trained_tokens"] == count == 3 + 1 + 9 + 1
    for name, weight in policy.module.named_parameters():
        assert_close(caught[name], weight.grad, atol=1e-5, rtol=1e-3)


def test_rl_begins_with_fresh_moments_and_the_whole_schedule(tokenizer, tmp_path):
    config = trainer_config(optimizer={"num_warmup_steps": 4})
    learner = TorchLearner(tiny_policy(), config, num_training_steps=10)
    sample = sample_of([*PROMPT, {"role": "assistant", "content": "yes"}], ChatTemplate(tokenizer), "row 0")
    batch = Conversations([sample], batch_size=1, epochs=1, seed=0).batch(1)
    for _ in range(3):
        learner.imitate(batch)
    optimizer = learner._optimizer
    steps = set(optimizer.plain_state()["steps"].values())
    assert (steps, optimizer.learning_rate, learner.policy_version) == ({3}, 0.0, 3)
    learner.save(tmp_path).result()
    other = TorchLearner(tiny_policy(), config, num_training_steps=10)
    other.load(tmp_path)
    rl = add_advantages(learner.add_logprobs(random_batch()), config.algorithm)
    assert learner.update(rl) == other.update(rl)
    assert (
        set(optimizer.plain_state()["steps"].values()) == set(other._optimizer.plain_state()["steps"].values()) == {1}
    )


def test_the_reference_that_has_imitated_is_kept_in_a_checkpoint(tokenizer, tmp_path):
    """It is no longer the model that was loaded, so a resumed run would measure the KL from another one."""
    config = trainer_config({"kl_loss_coef": 0.1}, sft=SFTConfig(data=["shown.jsonl"]))
    config.ref.model.path = config.policy.model.path  # as a whole configuration resolves it

    def learner_of() -> TorchLearner:
        return TorchLearner(tiny_policy(), config, num_training_steps=10, reference=tiny_policy())

    learner, other = learner_of(), learner_of()
    sample = sample_of([*PROMPT, {"role": "assistant", "content": "yes"}], ChatTemplate(tokenizer), "row 0")
    learner.imitate(Conversations([sample], batch_size=1, epochs=1, seed=0).batch(1))
    learner.update_reference()
    learner.save(tmp_path).result()
    other.load(tmp_path)
    for each in (learner, other):
        assert each.reference is not None
        weights = each.reference.weights
        assert all(torch.equal(weight, learner.policy.weights[name]) for name, weight in weights.items())
