"""vLLM behind the engine's protocol: AsyncLLM in this process, scheduler and workers in processes of their own."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import uuid
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import vllm
from transformers import PreTrainedTokenizerBase
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from skyrl_train.engine.base import Completion, EngineDied, Request, StopReason, refuse_impossible_prompt
from skyrl_train.engine.vllm.arguments import arguments_of, proof_params, vllm_params, whole_distribution
from skyrl_train.engine.vllm.settings import LEAST_TEMPERATURE, VllmSettings
from skyrl_train.engine.vllm.worker import Announced, SharedWeightsWorker
from skyrl_train.weights.broadcast import Broadcast
from skyrl_train.weights.shared_memory import SharedWeights

T = TypeVar("T")
FEW = 8  # tokens: too few for a block of the prefix cache, so that both passes of a comparison compute the same
OTHER = 0.6  # a temperature
CUTS: dict[str, Any] = {"top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 1}
CLOSE_S = 20.0  # what healthy processes of vLLM get to end by themselves


class VllmEngine:
    """Samples with vLLM. It begins without weights and refuses requests until `load_weights` has brought some.

    The same seed, prompt and weights give the same tokens up to the rounding of matmuls of different shapes. That holds
    for requests with `in_round` as well: vLLM knows no rounds. `forget` has nothing to free, since vLLM drops the
    prefixes that were not used for the longest time by itself.

    What is finished while the engine is paused is delivered after `resume`: a proof of new weights lets vLLM compute
    for a moment, and what it samples then counts only once the weights are confirmed.
    """

    def __init__(self, llm: AsyncLLM, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use `start`."""
        self._llm, self._tokenizer = llm, tokenizer
        self.max_model_len: int = llm.model_config.max_model_len
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why, once it has
        self._running = asyncio.Event()  # not paused
        self._running.set()
        self._version: int | None = None  # of the weights; None before there are any
        self._asleep: list[str] = []  # vLLM's names of the memory that is given back
        self._is_tempered = False  # whether `_check_logprobs` has seen the logprobs that the learner computes
        self._request_ids = itertools.count()
        self._name = uuid.uuid4().hex  # of its workers together, for a learner that sends weights
        self.tokens_reused = 0  # of prompts, out of the prefix cache
        self._num_in_flight, self._busy_since, self._busy_until, self._busy_seconds = 0, 0.0, 0.0, 0.0
        self._tokens_seen = 0  # of the requests in flight, when `busy_seconds` was asked for last

    @classmethod
    async def start(cls, settings: VllmSettings, tokenizer: PreTrainedTokenizerBase) -> VllmEngine:
        """Start vLLM's processes, and return once they have computed something: the first pass is a slow one.

        EngineDied when one of them ends before.
        """
        try:
            llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments_of(settings))
        except RuntimeError as error:  # of vLLM, which knows no more than that a process has ended
            raise EngineDied(
                "a process of vLLM ended while it was started; its last lines in the log say why"
            ) from error
        engine = cls(llm, tokenizer)
        try:
            await engine._answer(llm.collective_rpc(SharedWeightsWorker.return_learners_logprobs.__name__))
            await engine._answer(engine._prompt_logprobs([0, 0]))
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one request was in flight. They stand still while vLLM samples nothing.

        That is seen when they are asked for, again and again.
        """
        if not self._num_in_flight:
            return self._busy_seconds
        states = self._llm.output_processor.request_states.values()
        num_tokens = sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)
        if num_tokens != self._tokens_seen:
            self._tokens_seen, self._busy_until = num_tokens, time.monotonic()
        return self._busy_seconds + self._busy_until - self._busy_since

    async def generate(self, request: Request) -> Completion:
        self._refuse_impossible(request)
        await self._answer(self._running.wait())
        with self._busy():
            output = await self._answer(self._sample(request.prompt_ids, vllm_params(request.sampling)))
        await self._answer(self._running.wait())
        return self._completion(output)

    async def pause(self) -> None:
        """Return once nothing is being computed. Sequences in flight keep their tokens."""
        self._running.clear()
        await self._answer(self._llm.pause_generation(mode="keep", clear_cache=False))

    async def load_weights(self, weights: SharedWeights | Broadcast) -> None:
        """Replace all weights, and drop all keys and values. If that fails, vLLM may hold half of them: it stops."""
        loading = asyncio.gather(self._answer(self._load(weights)), return_exceptions=True)
        try:
            [failure] = await loading
        except asyncio.CancelledError:
            self._stop(f"loading the weights of version {weights.version} was given up half-way")
            raise
        if failure is not None:
            self._stop(f"the weights of version {weights.version} were not loaded: {failure}")
            raise self._refusal() from failure

    async def sleep(self) -> None:
        """Pause and give all memory back. The weights are dropped, not kept: a push brings others before they are read.

        vLLM's build for CPUs keeps its memory, with a warning, and goes through the same states.
        """
        self._running.clear()
        await self._answer(self._llm.sleep(level=2, mode="keep"))
        self._asleep = ["weights", "kv_cache"]

    async def weights_changed(self, policy_version: int) -> None:
        """Stamp later completions. `load_weights` has done so already, unless the version has another name now."""
        if policy_version != self._version:
            await self._answer(self._forget_old_weights(policy_version))

    async def resume(self) -> None:
        await self._answer(self._wake("weights", "kv_cache"))
        await self._answer(self._llm.resume_generation())
        self._running.set()

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        """Return the logprobs of ids[1:]. A paused engine computes meanwhile, and is paused again.

        The first time also checks the logprobs of sampled tokens: EngineDied if they are not the learner's.
        """
        await self._answer(self._wake("weights", "kv_cache"))
        if self._running.is_set():
            return await self._answer(self._proof(ids))
        await self._answer(self._llm.resume_generation())
        logprobs: list[float] | None = None
        try:
            logprobs = await self._answer(self._proof(ids))
        finally:
            if logprobs is None:  # pausing what gives no answer would take for ever
                self._stop("it gave no logprobs of its prompt while it was paused")
        await self.pause()
        return logprobs

    async def forget(self, session_id: str) -> None:
        pass

    async def close(self) -> None:
        """End vLLM's processes. Requests in flight fail with `EngineDied`."""
        patience_s = 0.0 if self._stopped.done() else CLOSE_S
        self._stop("the engine was closed before this request was finished")
        if self._llm.output_handler is not None:  # it would log the end of vLLM's processes as an error
            self._llm.output_handler.cancel()
        await asyncio.to_thread(self._llm.shutdown, patience_s)

    def _refuse_impossible(self, request: Request) -> None:
        if self._stopped.done():
            raise self._refusal()
        who = f"session {request.session_id}"
        if self._version is None:
            raise RuntimeError(f"{who}: the engine has no weights yet; push some first")
        refuse_impossible_prompt(request, self.max_model_len, self._vocab_size)
        if 0 < request.sampling.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"{who}: vLLM would sample at temperature {LEAST_TEMPERATURE} instead of {request.sampling.temperature}"
            )

    async def _answer(self, call: Coroutine[Any, Any, T]) -> T:
        """Return what a call of vLLM returns. EngineDied as soon as the engine has stopped, whatever it waits for."""
        if self._stopped.done():
            call.close()
            raise self._refusal()
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait((task, self._stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if self._stopped.done():
            raise self._refusal()
        try:
            return task.result()
        except EngineDeadError as error:
            self._stop("a process of vLLM died; its last lines in the log say why")
            raise self._refusal() from error

    def _stop(self, why: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(why)

    def _refusal(self) -> EngineDied:
        return EngineDied(self._stopped.result())

    async def _wake(self, *kinds: str) -> None:
        """Take the memory again that `sleep` gave back. Once all is there vLLM lets its scheduler go on by itself."""
        for kind in [kind for kind in self._asleep if kind in kinds]:
            await self._llm.wake_up([kind])
            self._asleep.remove(kind)

    async def _load(self, weights: SharedWeights | Broadcast) -> None:
        await self._wake("weights")
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(Announced.of(weights, self._name)))
        await self._llm.finish_weight_update()
        await self._forget_old_weights(weights.version)

    async def _forget_old_weights(self, version: int) -> None:
        """Drop every key and value, those of sequences in flight too: vLLM computes them again when it goes on."""
        await self._llm.reset_prefix_cache(reset_running_requests=True)
        await self._llm.update_weight_version(str(version))
        self._version = version

    async def _sample(self, prompt_ids: list[int], params: vllm.SamplingParams) -> RequestOutput:
        """Return the only output. A caller who gives up cancels this, and vLLM aborts the request."""
        [output] = [
            output
            async for output in self._llm.generate(tokens_input(list(prompt_ids)), params, str(next(self._request_ids)))
        ]
        return output

    async def _proof(self, ids: list[int]) -> list[float]:
        if self._version is not None and not self._is_tempered:
            await self._check_logprobs(ids[:FEW])
        return await self._prompt_logprobs(ids)

    async def _check_logprobs(self, ids: list[int]) -> None:
        """Compare the logprobs of all tokens at another temperature, cut and penalised, with those at temperature 1.

        A sampler that vLLM has changed, or that samplers.py has left as it was, is found out here.
        """
        plain = await self._distribution(ids, whole_distribution(1.0))
        found = await self._distribution(ids, whole_distribution(OTHER, **CUTS))
        expected = (plain / OTHER).log_softmax(0)
        apart, would_be = (found - expected).abs().max().item(), (plain - expected).abs().max().item()
        if not apart <= 1e-3 + would_be / 20:
            self._stop(
                f"vLLM {vllm.__version__} returns logprobs at temperature {OTHER} that are {apart:.2g} nats from "
                "softmax(logits / temperature), which the learner computes"
            )
            raise self._refusal()
        self._is_tempered = True

    async def _distribution(self, ids: list[int], params: vllm.SamplingParams) -> torch.Tensor:
        """Return the logprobs [vocab] of the token behind the prompt."""
        [sampled] = (await self._sample(ids, params)).outputs
        assert sampled.logprobs is not None
        return torch.tensor([sampled.logprobs[0][token].logprob for token in range(self._vocab_size)])

    async def _prompt_logprobs(self, ids: list[int]) -> list[float]:
        found = (await self._sample(ids, proof_params())).prompt_logprobs or []
        return [at[token].logprob for token, at in zip(ids[1:], found[1:], strict=True) if at is not None]

    def _completion(self, output: RequestOutput) -> Completion:
        [sampled] = output.outputs
        self.tokens_reused += output.num_cached_tokens or 0
        ids = list(sampled.token_ids)
        logprobs = [at[token].logprob for token, at in zip(ids, sampled.logprobs or [], strict=True)]
        if not all(map(math.isfinite, logprobs)):
            self._stop("the policy's logits are not finite: the weights are broken")
            raise self._refusal()
        assert self._version is not None
        versions = [int(span.version) for span in sampled.weight_versions or []]
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(str(text), ids, logprobs, _reason(sampled), min(versions, default=self._version))

    @contextmanager
    def _busy(self) -> Generator[None]:
        if self._num_in_flight == 0:
            self._busy_since = self._busy_until = time.monotonic()
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._busy_seconds += time.monotonic() - self._busy_since


def _reason(sampled: CompletionOutput) -> StopReason:
    match sampled.finish_reason:
        case "stop" | "length" | "abort" as reason:
            return reason
        case other:
            raise RuntimeError(f"vLLM ended a response with {other!r}")
