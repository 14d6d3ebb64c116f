"""One episode: the policy and an environment take turns until one of the typed ends is reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Generator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from jinja2 import TemplateError

from skyrl_gym.contract import Step, short
from skyrl_train.engine.base import Completion, Engine, Request, SamplingParams
from skyrl_train.rollout.chat import Chat, ChatTemplate
from skyrl_train.rollout.env_calls import BrokenEnv, EnvCalls
from skyrl_train.rollout.lockstep import Lockstep
from skyrl_train.rollout.seeds import derive_seed
from skyrl_train.rollout.step_wise import StepWiseChat
from skyrl_train.rollout.task import EpisodeLimits, EpisodeTask
from skyrl_train.rollout.waiting import is_done_within
from skyrl_train.spans import span
from skyrl_train.types import EpisodeEnd, Message, Trajectory, Turn


class Cut(StrEnum):
    """The limit of the run (or of the row) that ended an episode before its environment said done."""

    TURNS = "turns"
    INPUT = "input"


@dataclass
class Episode:
    """Plays one EpisodeTask once. `waits_for` says at any moment what the episode waits for."""

    task: EpisodeTask
    engine: Engine
    template: ChatTemplate
    limits: EpisodeLimits
    env: EnvCalls
    lockstep: Lockstep | None = None  # only for reproducible rollouts
    attempt: int = 0
    waits_for: str = "its start"
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    cut: Cut | None = None  # the limit that ended an episode which its environment would have continued

    async def play(self) -> Trajectory:
        """Play the episode. Raises EnvFailure if the environment broke; the environment is closed on every path."""
        started = time.monotonic()
        try:
            self.waits_for = "the environment's init"
            async with self._beginning():
                self.messages = await self.env.init(self.task.prompt.messages)
                tools = await self.env.tool_schemas()
            with self._rendering(self.messages):
                template = self.template.offering(tools) if tools else self.template
                chat = template.start(self.messages)
            end = await self._turns(chat)
            self.waits_for = "the environment's metrics"
            metrics = await self.env.metrics()
        finally:
            self.waits_for = "the environment's close"
            with span("environment close"):
                await _to_its_end(self.env.close())
            await self.engine.forget(self._session_id)
        return Trajectory(
            prompt=self.task.prompt,
            repetition=self.task.repetition,
            seed=self.env.seed,
            messages=self.messages,
            turns=self.turns,
            end=end,
            env_metrics=metrics,
            num_attempts=self.attempt + 1,
            seconds=time.monotonic() - started,
        )

    @property
    def seed(self) -> int:
        return self.env.seed

    @property
    def _session_id(self) -> str:
        return f"{self.task.round_name}_{self.task.id}_{self.attempt}"

    def _beginning(self) -> AbstractAsyncContextManager[None]:
        if self.lockstep is None:
            return nullcontext()
        return self.lockstep.beginning(self.task.id, lambda: self.env.waits_for_others)

    async def _turns(self, chat: Chat | StepWiseChat) -> EpisodeEnd:
        while True:
            sampling = self._next_sampling(chat)
            if sampling is None:
                self.cut = Cut.INPUT
                await self._cut_short()
                return EpisodeEnd.OUT_OF_TOKENS
            if self.lockstep is not None:
                self.waits_for = "the other episodes"
                await self.lockstep.arrive(self.task.id)
            self.waits_for = "the engine"
            with span("generate", turn=len(self.turns) + 1, prompt_tokens=len(chat.ids)):
                request = Request(chat.ids, sampling, self._session_id, in_round=self.lockstep is not None)
                completion = await self.engine.generate(request)
            self.waits_for = "the environment's step"
            step = await self.env.step(completion.text)
            is_last = self.env.max_turns is not None and len(self.turns) + 1 >= self.env.max_turns
            over = step.done or is_last
            self._record(chat, completion, step, over)
            if over:
                if not step.done:
                    self.cut = Cut.TURNS
                return _how_it_ended(completion, step)

    async def _cut_short(self) -> None:
        """Add to the last turn's reward what the environment takes or pays when no tokens are left for another turn."""
        if self.turns:
            self.waits_for = "the environment's cut_short"
            last = self.turns[-1]
            reward, rewards = await self.env.cut_short()
            named = {name: last.rewards.get(name, 0.0) + rewards.get(name, 0.0) for name in last.rewards | rewards}
            self.turns[-1] = replace(last, reward=last.reward + reward, rewards=named)

    def _next_sampling(self, chat: Chat | StepWiseChat) -> SamplingParams | None:
        """Return the sampling of the next turn, or None if the history is too long for another turn."""
        sampling = self.task.sampling
        max_tokens = min(sampling.max_tokens, self.limits.max_context - len(chat.ids))
        if len(chat.ids) > self.limits.max_input_length or max_tokens < 1:
            return None
        seed = derive_seed(self.task.sampling_seed, "turn", len(self.turns))
        return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens), seed=seed)

    def _record(self, chat: Chat | StepWiseChat, completion: Completion, step: Step, over: bool) -> None:
        reply_ids, logprobs = (completion.response_ids, completion.logprobs) if over else chat.kept(completion)
        self.turns.append(
            Turn(
                prompt_ids=chat.ids,
                response_ids=reply_ids,
                logprobs=logprobs,
                reward=step.reward,
                text=completion.text,
                stop_reason=completion.stop_reason,
                policy_version=completion.policy_version,
                observation=step.observations,
                rewards=step.rewards,
            )
        )
        if over:
            return
        edited = step.postprocessed_action
        with self._rendering(step.observations):
            if edited is None or edited == completion.text:
                chat.append(reply_ids, step.observations)
            else:
                chat.append_edited(edited, step.observations)

    @contextmanager
    def _rendering(self, messages: list[Message]) -> Generator[None]:
        """Turn an error of the chat template into a BrokenEnv: the row's prompt was rendered before without one."""
        try:
            yield
        except (TemplateError, TypeError, ValueError) as error:
            name, said = self.task.prompt.env_class, short(messages)
            raise BrokenEnv(f"{name}: the chat template refuses its messages {said}: {error}") from error


async def _to_its_end(closing: Coroutine[Any, Any, None]) -> None:
    """Wait for a close, which has deadlines of its own, even if this episode is cancelled again meanwhile."""
    task, cancelled = asyncio.ensure_future(closing), False
    while not task.done():
        try:
            await is_done_within(task, None)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def _how_it_ended(completion: Completion, step: Step) -> EpisodeEnd:
    if completion.stop_reason == "length":
        return EpisodeEnd.OUT_OF_TOKENS
    if step.truncated or not step.done:
        return EpisodeEnd.OUT_OF_TURNS
    return EpisodeEnd.FINISHED
