"""An extension of vLLM's worker with a way back to vLLM's own sampler. vLLM imports this module in its worker."""

from __future__ import annotations

from vllm.v1.sample.sampler import Sampler

from skyrl_train.engine.vllm.worker import SharedWeightsWorker


class ReversibleWorker(SharedWeightsWorker):
    def return_vllms_logprobs(self) -> None:
        self.model_runner.sampler.__class__ = Sampler
