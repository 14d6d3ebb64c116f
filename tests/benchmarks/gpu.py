"""The engine and the learner on a GPU: tokens per second at 1, 32 and 256 requests, and the update's share of its peak.

uv run python -m tests.benchmarks.gpu [--shape qwen2.5-0.5b] [--tokens 128] [--prompt-tokens 128]
uv run python -m tests.benchmarks.gpu --device cpu --shape tiny      (tries the benchmark itself)

A Qwen2 of the shape with random weights and a tokenizer of bytes: nothing is downloaded. Requests come in groups of
eight. The ceiling of sampling reads every weight once a step and multiplies it by every row; that of the update is the
device's measured bf16 product rate at 6 operations per parameter and token. Useful tokens count: each prompt of a group
once, and every response.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import time
from collections.abc import Callable, Mapping
from itertools import count
from statistics import median
from typing import Any

import torch

from skyrl_train import compute
from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.config import AlgorithmConfig, TrainerConfig
from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.model import Policy, wrap_module
from skyrl_train.policy.precision import choose_compute_dtype
from tests.benchmarks.ceiling import product_rate, read_rate
from tests.benchmarks.comparison import Comparison
from tests.benchmarks.update import useful_tokens
from tests.benchmarks.workers.prompts import prompts
from tests.benchmarks.workers.samples import batch
from tests.tiny_models import tiny_module, tiny_tokenizer

GROUP = 8
GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.02,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.02,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.02,
    },
    "tiny": {"max_position_embeddings": 4096},
}


def main() -> None:
    chosen = read_arguments()
    device = torch.device(chosen.device)
    policy = compute.submit(random_policy, chosen.shape, device).result()
    size = sum(weight.numel() for weight in policy.module.parameters())
    on_gpu = device.type == "cuda"
    multiplied, read = (product_rate(8192, 8192), read_rate(GIB)) if on_gpu else (product_rate(), read_rate())
    theirs = {n: transformers_tokens_per_second(policy, n, chosen) for n in chosen.requests} if chosen.peers else {}
    numbers = {n: tokens_per_second(policy, n, chosen) for n in chosen.requests}
    singly = (
        {n: tokens_per_second(policy, n, chosen, ahead=False) for n in chosen.requests} if chosen.one_by_one else {}
    )
    updates = update(policy, chosen) if chosen.update_prompts else {"tokens_per_second": 0.0}
    ceilings = {n: n / max(2 * size / read, 2 * size * n / multiplied) for n in numbers}
    most = max(numbers)
    Comparison(
        what=f"{chosen.shape} with random weights, {most} requests of {chosen.tokens} tokens after "
        f"{chosen.prompt_tokens}; and updates",
        unit="tokens/s",
        ours=numbers[most],
        peers={"transformers": theirs[most]} if theirs else {},
        ceiling=ceilings[most],
        facts={
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "dtype": str(policy.compute_dtype).removeprefix("torch."),
            "parameters": size,
            "tokens_per_second": numbers,
            "one_by_one_tokens_per_second": singly,
            "transformers_tokens_per_second": theirs,
            "share_of_ceiling_at": {n: rate / ceilings[n] for n, rate in numbers.items()},
            "product_rate_tflops": multiplied / 1e12,
            "read_rate_gb": read / 1e9,
            "update": updates | {"share_of_product_rate": 6 * size * updates["tokens_per_second"] / multiplied},
        },
    ).print(chosen.json)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="of a response")
    parser.add_argument("--update-prompts", type=int, default=16, help="groups of eight in an update; 0: no update")
    parser.add_argument("--peers", action="store_true", help="transformers' generate, too, with the same weights")
    parser.add_argument(
        "--one-by-one", action="store_true", help="the engine that reads each step before the next, too"
    )
    parser.add_argument("--token-budget", type=int, default=8192, help="of one forward pass")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts; one more comes before them")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2, "torch finds no CUDA GPU on this machine; --device cpu --shape tiny tries the benchmark itself\n"
        )
    return chosen


def random_policy(shape: str, device: torch.device) -> Policy:
    """Make the model on the device: drawing half a billion random numbers on a CPU takes longer than all the rest."""
    dtype, _ = choose_compute_dtype(device, None)
    with device:
        module = tiny_module("qwen2", dtype=dtype, **SHAPES[shape])
    return wrap_module(module.to(device))


def tokens_per_second(policy: Policy, num_requests: int, chosen: argparse.Namespace, *, ahead: bool = True) -> float:
    """Return the tokens per second of the engine with this many concurrent requests."""
    engine = TorchEngine(policy, tiny_tokenizer(), max_num_seqs=num_requests, max_num_batched_tokens=8192)
    if not ahead:
        vars(engine._scheduler)["_start_ahead"] = lambda step: None
    asked = prompts(tiny_tokenizer(), -(-num_requests // GROUP), chosen.prompt_tokens)
    calls = count()

    async def rollout() -> None:
        call = next(calls)
        requests = [
            Request(
                asked[i // GROUP],
                SamplingParams(chosen.tokens, min_tokens=chosen.tokens, seed=num_requests * call + i),
                f"{call}-{i}",
            )
            for i in range(num_requests)
        ]
        await asyncio.gather(*map(engine.generate, requests))
        await asyncio.gather(*(engine.forget(request.session_id) for request in requests))

    with asyncio.Runner() as runner:
        seconds = timed(lambda: runner.run(rollout()), chosen.rounds, f"{num_requests} requests")
        runner.run(engine.close())
    return num_requests * chosen.tokens / seconds


def transformers_tokens_per_second(policy: Policy, num_requests: int, chosen: argparse.Namespace) -> float:
    """Return the tokens per second of `generate` with PyTorch's attention, at temperature 1, on one batch."""
    asked = prompts(tiny_tokenizer(), -(-num_requests // GROUP), chosen.prompt_tokens)
    ids = torch.tensor([asked[i // GROUP] for i in range(num_requests)], device=policy.device)
    module: Any = copy.deepcopy(policy.module)
    for part in module.modules():
        vars(part).pop("forward", None)  # transformers' own again
    module.set_attn_implementation("sdpa")

    def generate() -> None:
        length = {"min_new_tokens": chosen.tokens, "max_new_tokens": chosen.tokens}
        module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **length)

    seconds = compute.submit(timed, generate, chosen.rounds, f"transformers, {num_requests} requests").result()
    return num_requests * chosen.tokens / seconds


def update(policy: Policy, chosen: argparse.Namespace) -> dict[str, float]:
    """Return the useful tokens per second of the learner and its peak memory."""
    settings = {
        "num_prompts": chosen.update_prompts,
        "samples": GROUP,
        "tokens": chosen.tokens,
        "prompt_tokens": chosen.prompt_tokens,
    }
    config = TrainerConfig(
        algorithm=AlgorithmConfig(use_kl_loss=False),
        train_batch_size=chosen.update_prompts,
        policy_mini_batch_size=chosen.update_prompts,
        max_tokens_per_microbatch=chosen.token_budget,
    )
    samples = batch(tiny_tokenizer(), settings)
    learner = compute.submit(TorchLearner, policy, config, num_training_steps=100).result()

    def once() -> Mapping[str, float]:
        return learner.update(add_advantages(learner.add_logprobs(samples), config.algorithm))

    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    seconds = timed(lambda: compute.submit(once).result(), chosen.rounds, "update")
    peak = torch.cuda.max_memory_allocated(policy.device) / GIB if policy.device.type == "cuda" else 0.0
    return {"seconds": seconds, "tokens_per_second": useful_tokens(settings) / seconds, "peak_gib": peak}


def timed(work: Callable[[], object], rounds: int, what: str) -> float:
    """Return the median seconds of the rounds; the first, which records graphs and allocates memory, is left out."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    print(f"{what}: {', '.join(f'{seconds:.3f}' for seconds in taken)} s", file=sys.stderr, flush=True)
    return median(taken[1:])


if __name__ == "__main__":
    main()
