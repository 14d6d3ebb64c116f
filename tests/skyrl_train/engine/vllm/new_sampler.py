"""The sampler of vLLM's newer model runner, its Triton kernels interpreted on a CPU. `test_vllm.py` runs it apart.

Prints what is far from softmax(logits / temperature), and nothing else.
"""

# ruff: noqa: E402 (the environment and Triton's list of backends are read by imports)

from __future__ import annotations

import os
import sys
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
from triton.backends import backends

a_backend: Any = types.SimpleNamespace(driver=None)
backends["cpu"] = a_backend  # else vLLM would not import Triton where no GPU is

import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 (its buffers need no pinned memory)
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from skyrl_train.engine.vllm.samplers import temper

topk_topp_sampler.HAS_TRITON = False  # its kernel cannot be interpreted; vLLM's code in torch does the same
VOCAB, CPU = 97, torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.3}, {"repetition_penalty": 1.4}, {"min_tokens": 5},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
]  # fmt: skip


def sampler_of(params: list[SamplingParams]) -> tuple[Sampler, InputBatch]:
    """Return vLLM's own sampler, and a step in which each of these requests samples behind the prompt [1, 2, 3]."""
    states = RequestState(len(params), 16, 64, 0, VOCAB, CPU)
    sampler = Sampler(VllmConfig(), len(params), VOCAB, CPU, states)
    for i, sampling in enumerate(params):
        states.add_request(str(i), 3, [1, 2, 3], 0, max_tokens=9)
        sampler.add_request(states.req_id_to_index[str(i)], sampling)
    states.apply_staged_writes()
    sampler.apply_staged_writes()
    batch = InputBatch.make_dummy(len(params), len(params), InputBuffers(len(params), len(params), CPU))
    rows = [states.req_id_to_index[str(i)] for i in range(len(params))]
    batch.idx_mapping_np[:] = rows
    batch.idx_mapping[:] = torch.tensor(rows)
    return sampler, batch


def compare(params: list[SamplingParams], logits: torch.Tensor) -> None:
    sampler, batch = sampler_of(params)
    if "untouched" not in sys.argv:
        temper(types.SimpleNamespace(sampler=sampler))
    output = sampler(logits.clone(), batch)
    assert output.logprobs_tensors is not None
    tokens, found = output.sampled_token_ids, output.logprobs_tensors.logprobs[:, 0]
    temperature = torch.tensor([request.temperature or 1.0 for request in params])[:, None]
    expected = (logits.float() / temperature).log_softmax(-1).gather(1, tokens).flatten()
    for request, one, other in zip(params, found.tolist(), expected.tolist(), strict=True):
        if not abs(one - other) < 1e-5:
            print(logits.dtype, one, other, request)


def main() -> None:
    """Sample for requests of every kind, seven at once."""
    params = [
        SamplingParams(temperature=temperature, seed=i, logprobs=0, max_tokens=9, **kind)
        for i, kind in enumerate(KINDS)
        for temperature in (0.0, 0.6, 1.0, 1.3)
    ]
    generator = torch.Generator().manual_seed(1)
    for first, dtype in enumerate((torch.float32, torch.bfloat16) * 2):
        logits = torch.randn(7, VOCAB, generator=generator).mul(3).to(dtype)
        compare(params[7 * first : 7 * first + 7], logits)


if __name__ == "__main__":
    main()
