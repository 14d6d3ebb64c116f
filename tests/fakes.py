"""Small real objects for tests of the rollout: an engine with a script; environments that count down or break."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from skyrl_gym.core import EnvFailure
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_train.engine.base import Completion, Request

Reply = Callable[[Request], str]


@dataclass
class ScriptedEngine:
    """Replies with `reply(request)` token by token, each with a logprob of its own, and ends with the end of sequence.

    A reply longer than the request's max_tokens is cut, as a real engine would cut it.
    """

    tokenizer: Any
    reply: Reply
    end_with_eos: bool = True
    version: int = 0
    requests: list[Request] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    busy_seconds = 0.0
    max_model_len = 512

    def __post_init__(self) -> None:
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    async def generate(self, request: Request) -> Completion:
        await self._goes_on.wait()
        self.requests.append(request)
        text = self.reply(request)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.end_with_eos:
            ids = [*ids, self.tokenizer.eos_token_id]
        cut = ids[: request.sampling.max_tokens]
        completion = Completion(
            text=self.tokenizer.decode(cut, skip_special_tokens=True),
            response_ids=cut,
            logprobs=varied_logprobs(cut, before=len(request.prompt_ids)),
            stop_reason="length" if len(cut) < len(ids) else "stop",
            policy_version=self.version,
        )
        self.completions.append(completion)
        return completion

    async def forget(self, session_id: str) -> None:
        self.forgotten.append(session_id)

    async def pause(self) -> None:
        self._goes_on.clear()

    async def weights_changed(self, policy_version: int) -> None:
        self.version = policy_version

    async def resume(self) -> None:
        self._goes_on.set()

    async def close(self) -> None:
        pass


def varied_logprobs(ids: list[int], before: int = 0) -> list[float]:
    """Logprobs that differ from token to token and from place to place, exact in float32."""
    return [-(token + 1) / 1024 - (before + place) / 8 for place, token in enumerate(ids)]


class CountdownEnv(BaseTextEnv):
    """Pays 1 for the right next number, counting down from extras["start"]; done at 0 or at the turn limit."""

    live = 0  # constructed and not yet closed, over all instances

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.left = int(extras["start"])
        self.max_turns = int(extras["max_turns"])
        self.seed = extras["seed"]
        self.closed = False
        CountdownEnv.live += 1

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        right = action.strip() == str(self.left - 1)
        self.left -= right
        done = self.left == 0
        return {
            "observations": [] if done else [{"role": "user", "content": f"{self.left} left"}],
            "reward": float(right),
            "done": done or self.turns >= self.max_turns,
            "truncated": not done and self.turns >= self.max_turns,
            "metadata": {},
        }

    def cut_short(self) -> float:
        return -0.25

    def get_metrics(self) -> dict[str, Any]:
        return {"left": self.left, "seed": self.seed}

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            CountdownEnv.live -= 1


class FlakyEnv(CountdownEnv):
    """Fails in the first `extras["breaks"]` episodes of each prompt, in the way that extras["how"] names."""

    attempts: dict[str, int] = {}  # noqa: RUF012 - shared on purpose: it counts over instances

    def step(self, action: str) -> BaseTextEnvStepOutput:
        return super().step(action)

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config, extras)
        self.name = str(extras["name"])
        self.attempts[self.name] = self.attempts.get(self.name, 0) + 1
        self.breaks = int(extras["breaks"])
        self.broken = self.attempts[self.name] <= self.breaks
        self.how = extras["how"]

    def init(self, prompt: Any) -> Any:
        if self.broken:
            if self.how == "failure":
                raise EnvFailure("the server is gone")
            if self.how == "bug":
                raise KeyError("a bug in the environment")
            if self.how == "unlucky":
                raise RuntimeError(f"attempt {self.attempts[self.name]} had no luck")
            while self.attempts[self.name] <= self.breaks:  # "hang": until the next attempts work
                time.sleep(0.01)
        return super().init(prompt)


class FewSessionsEnv(CountdownEnv):
    """Counts down on one of `free` sessions that all instances share; each call takes a random while."""

    free = 2

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config, extras)
        self.asking = self.has_session = False

    @property
    def waits_for_others(self) -> bool:
        return self.asking and FewSessionsEnv.free == 0

    async def init_async(self, prompt: Any) -> Any:
        await asyncio.sleep(0.01 * random.random())
        self.asking = True
        while FewSessionsEnv.free == 0:  # noqa: ASYNC110 (an Event would belong to one test's loop)
            await asyncio.sleep(0.001)
        FewSessionsEnv.free -= 1
        self.asking, self.has_session = False, True
        await asyncio.sleep(0.01 * random.random())
        return self.init(prompt)

    async def step_async(self, action: str) -> BaseTextEnvStepOutput:
        await asyncio.sleep(0.01 * random.random())
        return self.step(action)

    async def close_async(self) -> None:
        await asyncio.sleep(0.01 * random.random())
        FewSessionsEnv.free += self.has_session
        self.has_session = False
        self.close()


class EvenEnv(BaseTextEnv):
    """Two turns, each paid by the share of characters with an even code point: even a random model learns something."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        return {
            "observations": [{"role": "user", "content": "more"}],
            "reward": sum(ord(letter) % 2 == 0 for letter in action) / max(len(action), 1),
            "done": self.turns == 2,
            "metadata": {},
        }
