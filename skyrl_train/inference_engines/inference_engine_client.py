"""The engine as SkyRL's generators call it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from skyrl_train.engine.base import Completion, Engine, Request, SamplingParams
from skyrl_train.inference_engines.base import InferenceEngineInput, InferenceEngineOutput
from skyrl_train.inference_engines.utils import read_sampling
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.seeds import derive_seed


class InferenceEngineClient:
    """Samples from the policy. `defaults` and `round_name` are of the round of episodes that is being played.

    The seed of a request follows from the run's, the round, the prompt's tokens and how often they came before.
    """

    def __init__(self, engine: Engine, template: ChatTemplate, *, max_model_len: int, seed: int) -> None:
        self.engine, self.template, self.tokenizer = engine, template, template.tokenizer
        self.max_model_len, self.seed = max_model_len, seed
        self.defaults = SamplingParams(max_tokens=max_model_len)
        self.round_name: tuple[str, int] = ("", 0)
        self.policy_version = 0  # of the newest completion
        self._asked: Counter[str] = Counter()
        self._sessions: set[str] = set()

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

    def begin_round(self, name: tuple[str, int], defaults: SamplingParams) -> None:
        self.round_name, self.defaults = name, defaults
        self._asked.clear()

    async def end_round(self) -> None:
        """Free what the engine keeps for the sessions of the round."""
        for session in self._sessions:
            await self.engine.forget(session)
        self._sessions.clear()

    async def _complete(self, ids: list[int], given: dict[str, Any], session: Any) -> Completion:
        room = self.max_model_len - len(ids)
        if room < 1:
            return Completion("", [], [], "length", self.policy_version)
        about = ",".join(map(str, ids))
        self._asked[about] += 1
        session_id = f"custom_{session}" if session is not None else f"custom_{about}_{self._asked[about]}"
        self._sessions.add(session_id)
        seed = derive_seed(self.seed, "custom generator", *self.round_name, about, self._asked[about])
        sampling = read_sampling(given, self.defaults, room=room, seed=seed)
        completion = await self.engine.generate(Request(ids, sampling, session_id))
        self.policy_version = max(self.policy_version, completion.policy_version)
        return completion
