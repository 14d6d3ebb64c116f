"""The engine as a protocol: token ids in, sampled token ids with their logprobs out. Rollouts know nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from skyrl_train.config.generator import LEAST_TEMPERATURE

if TYPE_CHECKING:
    from skyrl_train.weights.broadcast import Broadcast
    from skyrl_train.weights.shared_memory import SharedWeights

StopReason = Literal["stop", "length", "abort"]
OnProgress = Callable[[list[int], list[float]], None]  # the ids sampled so far, and their logprobs


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one completion. `temperature` 0 is greedy; `top_k` -1 and `top_p` 1 are off."""

    max_tokens: int
    min_tokens: int = 1  # end-of-sequence tokens and stop strings count only from here on
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # kept in the text and in the tokens
    seed: int = 0  # the same seed, prompt and weights give the same tokens, whatever else the engine is doing

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be in [0, max_tokens={self.max_tokens}]")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            words = f"must be 0 (greedy) or a finite number of at least {LEAST_TEMPERATURE}"
            raise ValueError(f"temperature={self.temperature} {words}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be -1 (off) or at least 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be a positive finite number")


@dataclass(frozen=True, slots=True)
class Request:
    """One turn to be sampled. Turns of one episode share `session_id`, so an engine can keep their KV cache.

    in_round: compute it together with the requests that were made in the same tick of the event loop, and no others.
    Then the same rounds in the same order give the same bits, whatever else the engine is asked for.

    on_progress: is called in the caller's event loop after each step, with what is sampled so far, until the completion
    is returned. Only an engine in this process calls it.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    session_id: str
    in_round: bool = False
    on_progress: OnProgress | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled response. The end-of-sequence token is part of `response_ids` if the policy sampled it.

    `logprobs` are of the sampled tokens under softmax(logits / temperature), before top-k, top-p and min-p cut the
    distribution (temperature 0: at temperature 1), which is what the learner computes for the same tokens.
    """

    text: str  # decoded without special tokens
    response_ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    policy_version: int


class EngineDied(RuntimeError):
    """The engine has stopped for good, by an error or because it was closed. The message says which.

    Every request that is waiting fails with it, and so does every later one. It says nothing about an environment or
    about an episode, so it is never retried and never counted as an environment failure.
    """


class Engine(Protocol):
    """Anything that samples from the policy.

    `generate`, `pause`, `weights_changed` and `resume` raise EngineDied once the engine has stopped; `forget` and
    `close` do not.
    """

    @property
    def max_model_len(self) -> int:
        """Tokens that one prompt and its response may have together."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has computed for since it was made."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Sample one completion. Calls that are made at the same time are batched by the engine."""
        ...

    async def pause(self) -> None:
        """Stop computing, and return once nothing is being computed any more.

        Requests in flight keep what they have sampled, and new ones wait: none is lost. A paused engine stays paused
        until `resume`, however often it is paused.
        """
        ...

    async def weights_changed(self, policy_version: int) -> None:
        """Drop every cached key and value, and stamp later completions with this version: there are new weights.

        Returns once no later step can use what was computed with the old weights.
        """
        ...

    async def resume(self) -> None:
        """Go on with the requests in flight and with those that came meanwhile."""
        ...

    async def forget(self, session_id: str) -> None:
        """Free what is kept for the next turn of this session: its episode is over. Unknown ids are fine."""
        ...

    async def close(self) -> None:
        """Stop for good. Requests that are waiting fail with EngineDied."""
        ...


class LoadingEngine(Engine, Protocol):
    """An engine with weights of its own, which come from a learner. Its calls raise EngineDied like the others."""

    async def load_weights(self, weights: SharedWeights | Broadcast, /) -> None:
        """Replace all weights by those of a file or of a broadcast. Call it between `pause` and `weights_changed`.

        All or nothing: after an error the engine refuses every request until a later call succeeds. A file is never
        rewritten, and may be unlinked once this returns. A broadcast is received: the learner sends meanwhile.
        """
        ...

    async def sleep(self) -> None:
        """Pause, and give back the memory of weights, keys and values where the engine can. Requests in flight stay.

        `load_weights` takes the memory for weights again, and what computes next the rest.
        """
        ...

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        """Return the logprobs of ids[1:], each given the tokens before it, at temperature 1.

        The learner computes the same: equal numbers prove that both hold the same weights. So a paused engine answers.
        """
        ...


def refuse_impossible_prompt(request: Request, max_model_len: int, vocab_size: int) -> None:
    """Raise ValueError for a prompt that no engine of this model can read: empty, too long, or of unknown tokens."""
    prompt, who = request.prompt_ids, f"session {request.session_id}"
    if not prompt:
        raise ValueError(f"{who}: the prompt is empty")
    if len(prompt) >= max_model_len:
        raise ValueError(
            f"{who}: the prompt has {len(prompt)} tokens, but prompt and response together may have "
            f"{max_model_len} (max_model_len); shorten the prompt or end the episode earlier"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ValueError(
            f"{who}: token ids run from {min(prompt)} to {max(prompt)}, but the model's vocabulary from 0 to "
            f"{vocab_size - 1}; is the tokenizer the model's own?"
        )


def engine_death(error: BaseException) -> EngineDied | None:
    """Return the EngineDied that is behind an error: itself, a member of its group, or what it was raised from.

    An environment or a generator of the user's may hold the engine, and wrap what the engine raises.
    """
    looked_at: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if isinstance(found, EngineDied):
            return found
        if found is not None and id(found) not in looked_at:
            looked_at.add(id(found))
            pending += found.exceptions if isinstance(found, BaseExceptionGroup) else ()
            pending += found.__cause__, found.__context__
    return None
