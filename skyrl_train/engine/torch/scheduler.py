"""Continuous batching: which tokens of which sequences the next forward pass computes, and what becomes of them.

One step is: fill free slots, compute a chunk of every sequence (its next token when it is decoding, as much of its
prompt as the token budget allows when it is not), sample where a sequence has been computed to its end, finish.
engine.py runs it in a thread. On a GPU the next decoding step is started before the host reads the tokens of the last
one, so that the device need not wait for the host: see `_start_ahead`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skyrl_train.engine.base import Completion, Request, StopReason
from skyrl_train.engine.torch.batched_sampling import BatchedDraw
from skyrl_train.engine.torch.cuda_graphs import GraphedPolicy
from skyrl_train.engine.torch.draws import Row, sent
from skyrl_train.engine.torch.forward import computes_in_pages, forward_pass
from skyrl_train.engine.torch.kv_cache import Chunk, KVCache, Saved
from skyrl_train.engine.torch.paged_cache import Cache, PagedCache
from skyrl_train.engine.torch.prefix_sharing import PrefixIndex
from skyrl_train.engine.torch.sampling import Drawn, begin_sampling
from skyrl_train.engine.torch.sessions import Kept, KeptSessions
from skyrl_train.engine.torch.stop import StopStrings
from skyrl_train.policy.end_of_turn import end_of_turn_ids
from skyrl_train.policy.model import Policy
from skyrl_train.spans import span


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counted since the engine was made."""

    prompt_tokens_computed: int = 0  # prompt tokens that went through the model
    tokens_reused: int = 0  # prompt tokens whose keys and values another request or an earlier turn had left
    tokens_sampled: int = 0
    steps: int = 0  # forward passes
    busy_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: tokens so far, and how many of them have keys and values in `slot`."""

    request: Request
    policy_version: int
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    waits_for: Sequence | None = None  # a sequence that is computing the first `shared` tokens of this one right now
    shared: int = 0
    parent: Sequence | None = None  # a sequence in a slot that holds the same first `shared` tokens
    has_ended: bool = False

    @property
    def response_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]


@dataclass(frozen=True, slots=True)
class EngineStep:
    """A forward pass that was started: the sequences that are computed to their end, and their next tokens."""

    sequences: list[Sequence]
    drawn: Drawn | BatchedDraw


class Scheduler:
    """The sequences of one engine: waiting, in slots, and what finished ones left for their next turn."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        kv_cache_bytes: int,
        session_cache_bytes: int,
        cuda_graphs: bool,
    ) -> None:
        self.stats = EngineStats()
        self._device, self._tokenizer = policy.device, tokenizer
        self._model, self._draw = forward_pass(policy, cuda_graphs=cuda_graphs, max_length=max_model_len)
        # A round takes the plain way on a GPU: a replayed step's last bits depend on how far the cache has grown.
        self._model_of_rounds = GraphedPolicy(policy, None) if isinstance(self._model, GraphedPolicy) else self._model
        self._max_num_seqs, self._budget, self._max_model_len = max_num_seqs, max_num_batched_tokens, max_model_len
        self._eos_ids = end_of_turn_ids(policy.module.generation_config, tokenizer)
        self._stop_strings = StopStrings(tokenizer)
        self._sessions = KeptSessions(session_cache_bytes, self._drop)
        self._cache = self._new_cache(policy, kv_cache_bytes)
        self._waiting: deque[Sequence] = deque()
        self._slots: list[Sequence] = []  # without gaps, so that decoding attends over no idle slot
        self._prompts: PrefixIndex[Sequence] = PrefixIndex()  # of the sequences in slots
        self._policy_version = 0
        self._ahead: EngineStep | None = None  # started before the step before it was read

    def _new_cache(self, policy: Policy, kv_cache_bytes: int) -> Cache:
        sizes = {"max_slots": self._max_num_seqs, "max_length": self._max_model_len}
        if not computes_in_pages(policy, max_length=self._max_model_len):
            return KVCache(policy, **sizes, max_bytes=kv_cache_bytes)
        num_bytes = kv_cache_bytes + self._sessions.budget
        return PagedCache(policy, **sizes, max_bytes=num_bytes, evict=self._sessions.forget_oldest)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._slots

    @property
    def max_cached_tokens(self) -> int:
        """Return the most tokens that one sequence may have, prompt and response."""
        return self._cache.max_tokens

    def room_for(self, request: Request) -> int:
        """Return how many tokens of cache the request may come to need."""
        return min(len(request.prompt_ids) + request.sampling.max_tokens, self._max_model_len)

    def add(self, request: Request) -> Sequence:
        sequence = Sequence(request, self._policy_version, list(request.prompt_ids))
        self._waiting.append(sequence)
        return sequence

    @torch.inference_mode()
    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is. One that is finished already is fine."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._slots:
            self._release(sequence)

    def forget(self, session_id: str) -> None:
        self._sessions.forget(session_id)

    def _drop(self, saved: Saved) -> None:
        self._cache.drop(saved)

    def weights_changed(self, policy_version: int) -> None:
        """Nothing computed with the old weights is used again: sequences in flight compute their tokens again.

        A response that was begun under an older version keeps that version: it says how old its oldest token may be.
        """
        self._policy_version, self._ahead = policy_version, None
        self._model.weights_changed()
        self._sessions.clear()
        for sequence in self._slots:
            sequence.computed, sequence.parent = 0, None
        for sequence in self._waiting:
            sequence.policy_version = policy_version

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Completion]]:
        """Compute one forward pass, or read the one that was started ahead; return the sequences that it finished."""
        began = time.perf_counter()
        step = self._ahead or self._start_next()
        self._ahead = self._start_ahead(step)
        finished = self._read(step)
        busy = self.stats.busy_seconds + time.perf_counter() - began
        self.stats = replace(self.stats, busy_seconds=busy)
        return finished

    def _start_next(self) -> EngineStep:
        self._admit()
        plan = self._plan()
        ids = [token for sequence, chunk in plan for token in sequence.tokens[chunk.start : chunk.stop]]
        step = self._start(plan, torch.tensor(ids))
        self._share_prefixes()
        return step

    def _start_ahead(self, step: EngineStep) -> EngineStep | None:
        """Start the decoding step that follows `step`, whose tokens only the GPU knows yet; None where that cannot be.

        A sequence that turns out to have ended computes one token too many, which `_read` drops. Nothing is started
        where the host has to decide something in between: whom to admit, which part of a prompt comes next, which
        tokens the repetition penalty has seen.
        """
        if not isinstance(step.drawn, BatchedDraw) or not self._only_decodes(step):
            return None
        going_on = [
            (sequence.slot, row)
            for row, sequence in enumerate(step.sequences)
            if not sequence.has_ended and not self._is_full(sequence, len(sequence.logprobs) + 1)
        ]
        if not going_on:
            return None
        going_on.sort()
        sequences, rows = [self._slots[slot] for slot, _ in going_on], [row for _, row in going_on]
        self._cache.reserve(len(self._slots), max(sequence.computed for sequence in sequences) + 1)
        ids = step.drawn.tokens
        if rows != list(range(len(ids))):
            ids = ids[sent(torch.tensor(rows), ids.device)]
        return self._start([(sequence, _chunk(sequence, 1)) for sequence in sequences], ids)

    def _only_decodes(self, step: EngineStep) -> bool:
        """Return whether what follows `step` is one token of each sequence, whatever it draws."""
        sequences = [sequence for sequence in step.sequences if not sequence.has_ended]
        if len(sequences) < len(self._slots) or (self._waiting and len(self._slots) < self._max_num_seqs):
            return False
        return not any(s.request.in_round or s.request.sampling.repetition_penalty != 1 for s in sequences)

    def _admit(self) -> None:
        """Give free slots to waiting requests, each with the longest prefix that is already known."""
        candidates = islice(self._waiting, self._max_num_seqs - len(self._slots))
        in_flight, waiting = (
            (self.room_for(sequence.request) for sequence in sequences) for sequences in (self._slots, candidates)
        )
        admitted = [self._waiting.popleft() for _ in range(self._cache.num_that_fit(in_flight, waiting))]
        if not admitted:
            return
        active = [*self._slots, *admitted]
        self._cache.reserve(len(active), max(len(sequence.tokens) for sequence in active))
        for sequence in admitted:
            sequence.slot = len(self._slots)
            self._reuse(sequence)
            self._slots.append(sequence)
            self._prompts.add(sequence.request.prompt_ids, sequence)

    def _reuse(self, sequence: Sequence) -> None:
        """Start behind the longest known prefix; at least the last prompt token is computed, for its logits."""
        prompt, most = sequence.request.prompt_ids, len(sequence.request.prompt_ids) - 1
        length, kept = self._sessions.longest_prefix(sequence.request.session_id, prompt)
        shared, parent = self._prompts.longest(prompt) if length < most else (0, None)
        length, parent = (min(shared, most), parent) if shared > length else (min(length, most), None)
        if parent is not None:
            while (first := parent.waits_for or parent.parent) is not None and parent.shared >= length:
                parent = first  # one sequence for all that share as much
            sequence.waits_for, sequence.shared = parent, length
            self._share(sequence)
        elif kept is not None:
            self._cache.load(sequence.slot, kept.saved, length)
            self._count_reused(sequence, length)

    def _share_prefixes(self) -> None:
        for sequence in self._slots:
            self._share(sequence)

    def _share(self, sequence: Sequence) -> None:
        """Take the shared prefix once the sequence that computes it has done so."""
        if sequence.waits_for is not None and sequence.waits_for.computed >= sequence.shared:
            self._cache.share(sequence.waits_for.slot, sequence.slot, sequence.shared)
            self._count_reused(sequence, sequence.shared)
            sequence.waits_for, sequence.parent = None, sequence.waits_for

    def _count_reused(self, sequence: Sequence, length: int) -> None:
        sequence.computed = length
        self.stats = replace(self.stats, tokens_reused=self.stats.tokens_reused + length)

    def _plan(self) -> list[tuple[Sequence, Chunk]]:
        """Return what to compute now: a token of every decoding sequence; prompts in slot order within the budget."""
        ready = [sequence for sequence in self._slots if sequence.waits_for is None]
        singles = [sequence for sequence in ready if len(sequence.tokens) - sequence.computed == 1]
        longs = [sequence for sequence in ready if len(sequence.tokens) - sequence.computed > 1]
        plan = [(sequence, _chunk(sequence, 1)) for sequence in singles]
        budget = max(self._budget - len(plan), 2)  # always some progress; a chunk of one would be a decoding row
        for sequence in longs:
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count < 2:
                break
            plan.append((sequence, _chunk(sequence, count)))
            budget -= count
        plan.sort(key=lambda pair: pair[1].count)  # the shortest first, as the attention wants them; stable
        self._cache.reserve(len(self._slots), max(len(sequence.tokens) for sequence in self._slots))
        return plan

    def _start(self, plan: list[tuple[Sequence, Chunk]], ids: Tensor) -> EngineStep:
        """Compute the tokens `ids` [T] of all chunks, and draw where a sequence is computed to its end."""
        with span("engine step", sequences=len(plan), tokens=len(ids)):
            hidden = self._forward(plan, ids)
            with span("sample"):
                return self._begin_sampling(plan, hidden)

    def _begin_sampling(self, plan: list[tuple[Sequence, Chunk]], hidden: Tensor) -> EngineStep:
        ends, done, end = [], [], -1
        for sequence, chunk in plan:
            end += chunk.count
            if sequence.computed >= len(sequence.tokens):
                ends.append(end)
                done.append(sequence)
        if not done:
            return EngineStep([], Drawn(([], [])))
        last = hidden if len(ends) == len(hidden) else hidden[sent(torch.tensor(ends), hidden.device)]
        rows = [self._row(sequence) for sequence in done]
        return EngineStep(done, begin_sampling(self._model.logits(last), rows, self._draw))

    def _forward(self, plan: list[tuple[Sequence, Chunk]], ids: Tensor) -> Tensor:
        """Hidden states of the row of all chunks, [T, hidden]."""
        positions = torch.tensor([position for _, chunk in plan for position in range(chunk.start, chunk.stop)])
        attention = self._cache.attention([chunk for _, chunk in plan])
        model = self._model_of_rounds if plan[0][0].request.in_round else self._model
        hidden = model.hidden_states(ids, positions, attention)
        computed = 0
        for sequence, chunk in plan:
            computed += max(0, min(chunk.stop, len(sequence.request.prompt_ids)) - chunk.start)
            sequence.computed = chunk.stop
        stats = self.stats
        self.stats = replace(
            stats, steps=stats.steps + 1, prompt_tokens_computed=stats.prompt_tokens_computed + computed
        )
        return hidden

    def _read(self, step: EngineStep) -> list[tuple[Sequence, Completion]]:
        """Append the tokens that the step has drawn, and finish the sequences that they end."""
        with span("read tokens"):
            tokens, logprobs = step.drawn.read()
        if isinstance(step.drawn, BatchedDraw) and step.drawn.is_redrawn:
            self._drop_ahead()
        finished, num_sampled = [], 0
        for sequence, token, logprob in zip(step.sequences, tokens, logprobs, strict=True):
            if sequence.has_ended:
                continue
            num_sampled += 1
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if (reason := self._stop_reason(sequence)) is not None:
                finished.append((sequence, reason))
        self.stats = replace(self.stats, tokens_sampled=self.stats.tokens_sampled + num_sampled)
        finished.sort(key=lambda pair: -pair[0].slot)  # releasing from behind moves fewer sequences
        return [(sequence, self._finish(sequence, reason)) for sequence, reason in finished]

    def _drop_ahead(self) -> None:
        """Forget the step that was started ahead: its sequences compute their last token again."""
        for sequence in self._ahead.sequences if self._ahead is not None else ():
            sequence.computed -= 1
        self._ahead = None

    def _row(self, sequence: Sequence) -> Row:
        params, position = sequence.request.sampling, sequence.computed
        short = position - len(sequence.request.prompt_ids) + 1 < params.min_tokens
        return Row(params, position, sequence.tokens, self._eos_ids if short else ())

    def _stop_reason(self, sequence: Sequence) -> StopReason | None:
        params, num_tokens = sequence.request.sampling, len(sequence.logprobs)
        if num_tokens >= params.min_tokens:
            if sequence.tokens[-1] in self._eos_ids:
                return "stop"
            if params.stop and self._stop_strings.ended(sequence.response_ids, params.stop):
                return "stop"
        return "length" if self._is_full(sequence, num_tokens) else None

    def _is_full(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether a response of `num_tokens` may not grow longer."""
        request = sequence.request
        is_longest = len(request.prompt_ids) + num_tokens >= self._max_model_len
        return is_longest or num_tokens >= request.sampling.max_tokens

    def _finish(self, sequence: Sequence, reason: StopReason) -> Completion:
        if sequence.computed <= self._cache.max_kept(self._sessions.budget):
            kept = Kept(sequence.tokens[: sequence.computed], self._cache.save(sequence.slot, sequence.computed))
            self._sessions.keep(sequence.request.session_id, kept)
        self._release(sequence)
        text = self._tokenizer.decode(sequence.response_ids, skip_special_tokens=True)
        return Completion(
            str(text), sequence.response_ids, sequence.logprobs, reason, policy_version=sequence.policy_version
        )

    def _release(self, sequence: Sequence) -> None:
        """Free a slot; the last sequence moves into it."""
        sequence.has_ended = True
        self._prompts.remove(sequence.request.prompt_ids, sequence)
        self._cache.free(sequence.slot)
        last = self._slots.pop()
        if last is not sequence:
            self._cache.move(last.slot, sequence.slot, last.computed)
            self._slots[sequence.slot], last.slot = last, sequence.slot
        successor: Sequence | None = None  # sequences that read a prefix in its slot now read it in the first one's
        for other in self._slots:
            if other.waits_for is sequence:
                other.waits_for = None  # its prefix will not come: compute it
            if other.parent is sequence:
                other.parent = successor
                if successor is None:
                    successor = other
                else:
                    other.shared = min(other.shared, successor.shared)


def _chunk(sequence: Sequence, count: int) -> Chunk:
    """Return the chunk of its next `count` tokens."""
    if sequence.parent is None:
        return Chunk(sequence.slot, sequence.computed, count)
    return Chunk(sequence.slot, sequence.computed, count, sequence.parent.slot, sequence.shared)
