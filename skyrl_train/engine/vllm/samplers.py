"""vLLM's samplers with the learner's logprobs: softmax(logits / temperature), before penalties and cuts.

vLLM itself returns logprobs at temperature 1, or those of what penalties and cuts leave. Its two model runners have a
sampler each: the newer one (v1/worker/gpu) needs Triton and is taken on GPUs, the older one on CPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as OldSampler
from vllm.v1.worker.gpu.sample.sampler import Sampler as NewSampler


class TemperedOldSampler(OldSampler):
    """The older sampler: what it calls raw logprobs is divided by the temperature of each row."""

    temperature: Tensor | None = None  # [rows], 0 where greedy, while a step is sampled; None is 1 everywhere

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        self.temperature = sampling_metadata.temperature
        try:
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        finally:
            self.temperature = None

    def compute_logprobs(self, logits: Tensor) -> Tensor:  # also asked for those of prompts, between steps
        if self.temperature is not None:
            logits = logits.to(torch.float32, copy=True)
            logits = self.apply_temperature(logits, self.temperature, all_random=False)
        return super().compute_logprobs(logits)


class TemperedNewSampler(NewSampler):
    """The newer sampler: what it calls processed logits are the model's, divided by the temperature of each row."""

    def sample(
        self,
        logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        sampled, _ = super().sample(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, *args, **kwargs)
        tempered = logits.to(torch.float32, copy=True)
        self.sampling_states.apply_temperature(tempered, expanded_idx_mapping, idx_mapping_np)
        return sampled, tempered


def temper(runner: Any) -> None:
    """Let a model runner return the learner's logprobs. TypeError for one that samples in a way unknown here.

    Call it before the first request. Whether it had an effect is checked by VllmEngine with the first weights.
    """
    sampler = runner.sampler
    if getattr(runner, "rejection_sampler", None) is not None:
        raise TypeError("vLLM decodes speculatively, and its logprobs are then not those that the learner computes")
    if type(sampler) is OldSampler:
        sampler.__class__, sampler.logprobs_mode = TemperedOldSampler, "raw_logprobs"
    elif type(sampler) is NewSampler and not sampler.return_sampling_mask:
        sampler.__class__, sampler.logprobs_mode = TemperedNewSampler, "processed_logprobs"
    else:
        raise TypeError(
            f"vLLM samples with {type(sampler).__module__}.{type(sampler).__qualname__}, of which it is not known how "
            "it computes logprobs; drop what changes the sampler from generator.engine_init_kwargs"
        )
