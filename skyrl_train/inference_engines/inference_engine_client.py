"""The engine as SkyRL's generators call it."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.engine.base import Completion, Engine, EngineDied, Request, SamplingParams
from skyrl_train.inference_engines.base import InferenceEngineInput, InferenceEngineOutput
from skyrl_train.inference_engines.utils import read_sampling
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.round import Round
from skyrl_train.rollout.seeds import derive_seed


@dataclass
class RoundState:
    """The client's state of a round of episodes that is under way."""

    name: tuple[str, int]  # (phase, step)
    defaults: SamplingParams
    num_requests: Counter[str] = field(default_factory=Counter)  # of the same prompt
    sessions: set[str] = field(default_factory=set)
    death: EngineDied | None = None

    def refuse_dead_engine(self) -> None:
        """Raise the EngineDied that a request of this round ended with: a generator may have caught it."""
        if self.death is not None:
            raise self.death from self.death.__cause__


class InferenceEngineClient:
    """Samples from the policy. `defaults` and `round_name` are of the round of episodes that is being played.

    Of several rounds under way it is the one that was begun in the caller's context (contextvars): tasks that a
    generator starts, and threads of asyncio.to_thread, inherit it. Elsewhere it is the newest one.

    The seed of a request follows from the run's, the round, the prompt's tokens and how often they came before.
    """

    def __init__(
        self, engine: Engine, template: ChatTemplate, *, max_model_len: int, seed: int, endpoint_url: str | None = None
    ) -> None:
        self.engine, self.template, self.tokenizer = engine, template, template.tokenizer
        self.max_model_len, self.seed, self.endpoint_url = max_model_len, seed, endpoint_url
        self.policy_version = 0  # of the newest completion
        self._newest = RoundState(("", 0), SamplingParams(max_tokens=max_model_len))
        self._round: ContextVar[RoundState] = ContextVar("the round that is being played")

    @property
    def round_name(self) -> tuple[str, int]:
        return self._playing.name

    @property
    def defaults(self) -> SamplingParams:
        return self._playing.defaults

    @property
    def _playing(self) -> RoundState:
        return self._round.get(self._newest)

    def get_endpoint_url(self) -> str:
        """Return the address of the endpoint that serves the policy, without `/v1`. ValueError if none serves."""
        if self.endpoint_url is None:
            raise ValueError("no endpoint serves the policy; set generator.enable_http_endpoint=true")
        return self.endpoint_url

    async def generate(self, input_batch: InferenceEngineInput) -> InferenceEngineOutput:
        """Sample one completion per prompt; all are batched by the engine."""
        prompts, token_ids = input_batch.get("prompts"), input_batch.get("prompt_token_ids")
        if (prompts is None) == (token_ids is None):
            raise ValueError("an engine's input holds exactly one of prompts and prompt_token_ids")
        if token_ids is None:
            token_ids = [self.template.encode(messages, add_generation_prompt=True) for messages in prompts or []]
        sessions = input_batch.get("session_ids") or [None] * len(token_ids)
        if len(sessions) != len(token_ids):
            raise ValueError(f"{len(sessions)} session_ids for {len(token_ids)} prompts")
        given = dict(input_batch.get("sampling_params") or {})
        completions = await asyncio.gather(
            *(self._complete(list(ids), given, session) for ids, session in zip(token_ids, sessions, strict=True))
        )
        return {
            "responses": [completion.text for completion in completions],
            "response_ids": [completion.response_ids for completion in completions],
            "stop_reasons": [completion.stop_reason for completion in completions],
            "response_logprobs": [completion.logprobs for completion in completions],
        }

    def begin_round(self, this_round: Round) -> RoundState:
        """Requests made in this context, and in those that inherit it, belong to the round from now on."""
        self._newest = RoundState((this_round.phase, this_round.step), this_round.sampling)
        self._round.set(self._newest)
        return self._newest

    async def end_round(self, playing: RoundState) -> None:
        """Free what the engine keeps for the sessions of the round."""
        for session in playing.sessions:
            await self.engine.forget(session)
        playing.sessions.clear()

    async def _complete(self, ids: list[int], given: dict[str, Any], session: Any) -> Completion:
        playing = self._playing
        room = self.max_model_len - len(ids)
        if room < 1:
            return Completion("", [], [], "length", self.policy_version)
        about = ",".join(map(str, ids))
        playing.num_requests[about] += 1
        number = playing.num_requests[about]
        phase, step = playing.name
        session_id = f"{phase}_{step}_custom_{session if session is not None else f'{about}_{number}'}"
        playing.sessions.add(session_id)
        seed = derive_seed(self.seed, "custom generator", phase, step, about, number)
        sampling = read_sampling(given, playing.defaults, room=room, seed=seed)
        try:
            completion = await self.engine.generate(Request(ids, sampling, session_id))
        except EngineDied as death:
            playing.death = death
            raise
        self.policy_version = max(self.policy_version, completion.policy_version)
        return completion
