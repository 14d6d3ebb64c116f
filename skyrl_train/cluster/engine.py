"""An engine in an actor: requests go to its process, completions come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from skyrl_train.cluster.actors import Identity
from skyrl_train.cluster.deaths import cause_of, last_words, obituary
from skyrl_train.cluster.start import import_ray
from skyrl_train.engine.base import Completion, EngineDied, Request
from skyrl_train.weights.shared_memory import SharedWeights

if TYPE_CHECKING:
    from skyrl_train.cluster.machine import Copies
    from skyrl_train.cluster.session import Node
    from skyrl_train.weights.broadcast import Broadcast

LOOK_S = 5.0  # between two questions to an engine that has requests
SILENT_LOOKS = 12  # an engine that answers none of them hangs; one that computes answers beside that
CLOSE_S = 10.0  # for an engine to end what it has started; then its process is killed


class RayEngine:
    """A LoadingEngine in another process. EngineDied, with the last lines, once that is dead."""

    def __init__(
        self,
        actor: Any,
        name: str,
        identity: Identity,
        max_model_len: int,
        node: Node,
        copies: Copies,
        *,
        look_s: float = LOOK_S,
        silent_looks: int = SILENT_LOOKS,
    ) -> None:
        """actor: the handle of an EngineActor that is built. copies: brings weights to its machine, `node`.

        look_s, silent_looks: see above.
        """
        self._ray = import_ray()
        self._actor, self._name, self._identity = actor, name, identity
        self._max_model_len, self._busy_seconds = max_model_len, 0.0
        self._node, self._copies = node, copies
        self._look_s, self._silent_looks, self._num_requests = look_s, silent_looks, 0
        self._watch: asyncio.Task[None] | None = None  # while there are requests
        self._why_ended: str | None = None
        self._is_closed = False  # nothing may be asked of Ray then: it may have ended, and would start again

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def busy_seconds(self) -> float:
        """Return what the engine said last: with a completion, or when it was asked."""
        return self._busy_seconds

    async def generate(self, request: Request) -> Completion:
        """Return the completion. What is sampled on the way stays in the other process."""
        apart = replace(request, on_progress=None)
        self._num_requests += 1
        self._watch = self._watch or asyncio.create_task(self._look_again_and_again())
        try:
            completion, busy_seconds = await self._answer(self._actor.generate.remote, apart)
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._watch.cancel()
                self._watch = None
        self._busy_seconds = max(self._busy_seconds, busy_seconds)
        return completion

    async def _look_again_and_again(self) -> None:
        """Ask how long the engine has computed for, which tells a slow one from a silent one. End one that hangs."""
        await asyncio.sleep(self._look_s)
        while not self._is_closed:
            answer = asyncio.wrap_future(self._actor.busy_seconds.remote().future())
            answer.add_done_callback(_was_looked_at)
            for _ in range(self._silent_looks):  # and not by the clock: the driver may have been stopped itself
                if (await asyncio.wait((answer,), timeout=self._look_s))[0]:
                    break
            else:
                silent_s = self._silent_looks * self._look_s
                self._why_ended = (
                    f"{self._name} (process {self._identity.pid}) hung and was ended: it had not answered for "
                    f"{silent_s:.0f} s{last_words(self._identity)}"
                )
                self._ray.kill(self._actor)
                return
            if answer.exception() is not None:  # it has died, and its requests say so
                return
            self._busy_seconds = max(self._busy_seconds, answer.result())
            await asyncio.sleep(self._look_s)

    async def pause(self) -> None:
        await self._answer(self._actor.pause.remote)

    async def load_weights(self, weights: SharedWeights | Broadcast) -> None:
        there = weights
        try:
            if isinstance(weights, SharedWeights):
                there = await self._copies.on(self._node.id, weights)
        except self._ray.exceptions.RayActorError as error:
            raise EngineDied(f"{self._name}: {self._node.name} is gone: {error}") from None
        await self._answer(self._actor.load_weights.remote, there)

    async def sleep(self) -> None:
        await self._answer(self._actor.sleep.remote)

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        return await self._answer(self._actor.logprobs_of_tokens.remote, ids)

    async def weights_changed(self, policy_version: int) -> None:
        await self._answer(self._actor.weights_changed.remote, policy_version)

    async def resume(self) -> None:
        await self._answer(self._actor.resume.remote)

    async def forget(self, session_id: str) -> None:
        """Say so and do not wait; a dead engine has forgotten everything."""
        if not self._is_closed:
            self._actor.forget.remote(session_id)

    async def close(self) -> None:
        """Let the engine end what it has started, then end its process."""
        if self._is_closed:
            return
        try:
            await asyncio.wait_for(self._answer(self._actor.close.remote), CLOSE_S)
        except (EngineDied, TimeoutError):
            pass
        finally:
            self._is_closed = True
            self._ray.kill(self._actor)

    async def _answer(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the actor. A caller that gives up cancels the call in the other process, too."""
        if self._is_closed:
            raise EngineDied(f"{self._name} was closed")
        call = method(*args)
        try:
            return await call
        except asyncio.CancelledError:
            if not self._is_closed:
                self._ray.cancel(call)
            raise
        except self._ray.exceptions.RayActorError as error:
            raise EngineDied(self._why_ended or obituary(self._name, self._identity, error)) from None
        except self._ray.exceptions.RayTaskError as error:
            raise cause_of(error, self._name, self._identity) from error


def _was_looked_at(answer: asyncio.Future[float]) -> None:
    """Keep asyncio from reporting the error of an answer for which nobody waits any more."""
    if not answer.cancelled():
        answer.exception()
