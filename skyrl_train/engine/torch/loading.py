"""The torch engine with a policy of its own, which takes its weights from a learner: one of several engines."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train import compute
from skyrl_train.batch.packing import pack
from skyrl_train.engine.base import Completion, Request
from skyrl_train.engine.torch.engine import TorchEngine
from skyrl_train.policy.logprobs import batch_logprobs
from skyrl_train.policy.model import Policy
from skyrl_train.types import Sample
from skyrl_train.weights.broadcast import Receiver
from skyrl_train.weights.shared_memory import SharedWeights, read_shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.weights.broadcast import Broadcast


class LoadingTorchEngine(TorchEngine):
    """A TorchEngine that is a LoadingEngine. Nothing else may train its policy or sample from it."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        """Take the options of TorchEngine."""
        super().__init__(policy, tokenizer, **options)
        self._policy = policy
        self._not_loaded: str | None = None  # why it has no whole weights
        self._receiver = Receiver(uuid.uuid4().hex, policy.device)

    async def generate(self, request: Request) -> Completion:
        if self._not_loaded is not None:
            raise RuntimeError(self._not_loaded)
        return await super().generate(request)

    async def load_weights(self, weights: SharedWeights | Broadcast) -> None:
        """Replace all weights, in the compute thread. ValueError if a name, a shape or a type is not the policy's."""
        if self._stopped is not None:
            raise self._refusal()
        self._not_loaded = f"the weights of version {weights.version} were not loaded"
        await asyncio.wrap_future(compute.submit(self._load, weights))
        self._not_loaded = None

    async def sleep(self) -> None:
        """Pause. The memory stays: this engine never shares a GPU with a learner of another process (placement.py)."""
        await self.pause()

    async def logprobs_of_tokens(self, ids: list[int]) -> list[float]:
        if self._stopped is not None:
            raise self._refusal()
        return await asyncio.wrap_future(compute.submit(self._logprobs, ids))

    # Below: in the compute thread.

    @torch.no_grad()
    def _load(self, weights: SharedWeights | Broadcast) -> None:
        is_file = isinstance(weights, SharedWeights)
        new, where = (read_shared(weights), weights.path) if is_file else (self._receiver.receive(weights), "broadcast")
        new, own = dict(new), self._policy.weights
        if wrong := new.keys() ^ own.keys():
            raise ValueError(f"{where}: the weights and the policy differ in {', '.join(sorted(wrong)[:4])}")
        for name, weight in own.items():
            if new[name].shape != weight.shape or new[name].dtype != weight.dtype:
                given, wanted = (f"{t.dtype} of {list(t.shape)}" for t in (new[name], weight))
                raise ValueError(f"{where}: {name} is {given}, but the policy has {wanted}")
        for name, weight in own.items():
            weight.copy_(new[name])

    @torch.no_grad()
    def _logprobs(self, ids: list[int]) -> list[float]:
        if len(ids) < 2:
            raise ValueError(f"{len(ids)} token ids: the first one has nothing before it, so at least two are needed")
        zeros = [0.0] * len(ids)
        after_the_first = [False] + [True] * (len(ids) - 1)
        batch = pack([Sample(ids, after_the_first, zeros, zeros, num_prompt_tokens=1, group_id="", trajectory_id="")])
        return batch_logprobs(self._policy, batch, temperature=1.0)[0][1:].tolist()
