"""The record of one agent's calls: the tokens of each, as the engine read and sampled them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_gym.core import EnvFailure
from skyrl_train.engine.base import Completion, EngineDied, SamplingParams
from skyrl_train.rollout.agents.openai_api import BadRequest, Body
from skyrl_train.rollout.agents.replies import said_in
from skyrl_train.rollout.agents.streaming import cut_at_stop
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.episode import Cut
from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.rollout.template_check import TemplateRefused
from skyrl_train.types import Message, Turn


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """The limits of a session's calls. None: as many as the agent likes."""

    max_calls: int | None
    max_input_length: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Call:
    """One finished call. messages: what the agent sent; empty for a call with a plain text. tools: what it offered.

    stops: the agent's own stop strings, which are sampled and not sent to it.
    """

    messages: list[Message]
    prompt_ids: list[int]
    completion: Completion
    tools: list[dict[str, Any]] = field(default_factory=list)
    stops: tuple[str, ...] = ()


@dataclass
class AgentSession:
    """The calls of one agent in one episode. `sampling` is the run's: what the agent asks for itself is not read.

    For the learner's logprobs are those of the run's temperature, and its token limit bounds a step's memory. Only a
    smaller number of tokens and further stop strings are taken from the agent.
    """

    id: str
    template: ChatTemplate
    sampling: SamplingParams
    limits: SessionLimits
    seed: int
    calls: list[Call] = field(default_factory=list)
    num_begun: int = 0
    cut: Cut | None = None  # the limit at which a call was refused
    death: EngineDied | None = None  # of the engine, during a call

    def prompt_of(self, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a conversation with these tools. BadRequest if the template does not print it.

        Where it goes on from an earlier call, its reply included, these are the tokens that were read and sampled then,
        and what the template prints behind them: nothing that was sampled is encoded again, unless the template prints
        it otherwise by now (generator.step_wise_trajectories).
        """
        try:
            template = self.template.offering(tools) if tools else self.template
            for call in reversed(self.calls):
                if call.tools == tools and (news := _continues(call, messages)) is not None:
                    chat = template.start(call.messages, call.prompt_ids)
                    chat.append(call.completion.response_ids, news)
                    return chat.ids
            return template.start(messages).ids
        except TemplateRefused as error:
            raise BadRequest(str(error), param="tools") from error
        except EnvFailure as error:
            raise BadRequest(str(error), param="messages") from error

    def sampling_of(self, body: Body, num_prompt_tokens: int) -> SamplingParams:
        """Return the sampling of the coming call, and count it. BadRequest if it is one call or one token too many."""
        room = self.limits.max_context - num_prompt_tokens
        if num_prompt_tokens > self.limits.max_input_length or room < 1:
            self.cut = Cut.INPUT
            longest = min(self.limits.max_input_length, self.limits.max_context - 1)
            raise BadRequest(
                f"the conversation has {num_prompt_tokens} tokens, and at most {longest} can be read "
                "(generator.max_input_length)",
                param="messages",
                code="context_length_exceeded",
            )
        if self.limits.max_calls is not None and self.num_begun >= self.limits.max_calls:
            self.cut = Cut.TURNS
            raise BadRequest(f"this episode may make {self.limits.max_calls} calls (generator.max_turns)")
        max_tokens = min(self.sampling.max_tokens, body.longest_reply or self.sampling.max_tokens, room)
        stop = tuple(dict.fromkeys((*self.sampling.stop, *body.stops)))
        seed = derive_seed(self.seed, "turn", self.num_begun)
        self.num_begun += 1
        min_tokens = min(self.sampling.min_tokens, max_tokens)
        return replace(self.sampling, max_tokens=max_tokens, min_tokens=min_tokens, stop=stop, seed=seed)

    def turns(self, reward: float) -> list[Turn]:
        """Return the calls as turns, in the order in which they were finished. The last one is paid."""
        turns = []
        for i, call in enumerate(self.calls):
            done = call.completion
            news = _continues(call, self.calls[i + 1].messages) if i + 1 < len(self.calls) else None
            turns.append(
                Turn(
                    prompt_ids=call.prompt_ids,
                    response_ids=done.response_ids,
                    logprobs=done.logprobs,
                    reward=reward if i + 1 == len(self.calls) else 0.0,
                    text=done.text,
                    stop_reason=done.stop_reason,
                    policy_version=done.policy_version,
                    observation=list(news or []),
                )
            )
        return turns


def _continues(call: Call, messages: Sequence[Message]) -> list[Message] | None:
    """Return what comes behind the reply of an earlier call; None if the conversation does not go on from there.

    A client may have stripped white space from the reply.
    """
    place = len(call.messages)
    if not call.messages or len(messages) <= place + 1 or list(messages[:place]) != call.messages:
        return None
    reply, news = messages[place], list(messages[place + 1 :])
    words, calls = said_in(cut_at_stop(call.completion.text, call.stops), may_call=bool(call.tools))
    again = [(said["function"]["name"], said["function"]["arguments"]) for said in reply.get("tool_calls", ())]
    is_same = reply["role"] == "assistant" and reply["content"].strip() == words.strip()
    is_same = is_same and again == [(said.name, said.arguments) for said in calls]
    return news if is_same and all(message["role"] != "assistant" for message in news) else None
