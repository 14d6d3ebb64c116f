"""The engine, the learner and a whole GRPO step on a GPU, beside its peak, transformers' generate and TRL.

uv run python -m tests.benchmarks.gpu --peers --step [--shape qwen2.5-1.5b] [--prompt-tokens 128 4096]
uv run python -m tests.benchmarks.gpu --shape qwen2.5-7b --lora 32
uv run python -m tests.benchmarks.gpu --device cpu --shape tiny --step    (tries the benchmark itself)

Everything runs on a Qwen2 of the shape with random weights: nothing is downloaded. Requests come in groups of eight
that share a prompt. The ceiling of sampling computes each prompt once; a decoding step then reads every weight, and the
keys and values once that its rows attend to, and multiplies the weights by every row. The ceiling of an update is the
device's measured bf16 product rate at the operations that its useful tokens need (each prompt of a group once, and
every response; learning adapters costs two thirds of them).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from skyrl_train import compute
from skyrl_train.algorithms.advantages import add_advantages
from skyrl_train.config import AlgorithmConfig, LoraConfig, TrainerConfig
from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.lora import add_adapters
from skyrl_train.policy.model import Policy
from tests.benchmarks.ceiling import product_rate, read_rate
from tests.benchmarks.comparison import Comparison, medians
from tests.benchmarks.shapes import SHAPES, random_policy, save_random_model
from tests.benchmarks.side_by_side import TRL, Worker, add_trl_arguments, project, timed_in_turn, trl_settings
from tests.benchmarks.update import seen_tokens, useful_tokens
from tests.benchmarks.workers.prompts import prompts
from tests.benchmarks.workers.samples import batch
from tests.tiny_models import tiny_tokenizer

GROUP = 8
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Work:
    """Groups of samples: `num_prompts` prompts of `prompt_tokens` tokens, `samples` responses of `tokens` to each."""

    num_prompts: int
    samples: int
    prompt_tokens: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Work:
        """Read PROMPTSxSAMPLESxPROMPT_TOKENS+TOKENS, such as 16x8x128+128."""
        if not (found := re.fullmatch(r"(\d+)x(\d+)x(\d+)\+(\d+)", text)):
            raise argparse.ArgumentTypeError(
                f"{text} must be PROMPTSxSAMPLESxPROMPT_TOKENS+TOKENS, such as 16x8x128+128"
            )
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.num_prompts}x{self.samples}x{self.prompt_tokens}+{self.tokens}"


@dataclass(frozen=True, slots=True)
class Peak:
    """What the device can do at most: bf16 operations and bytes read from its memory, per second."""

    multiplied: float
    read: float

    @classmethod
    def measured(cls, device: torch.device) -> Peak:
        if device.type == "cuda":
            return cls(product_rate(8192, 8192), read_rate(GIB))
        return cls(product_rate(), read_rate())

    def sampled(self, policy: Policy, num_requests: int, work: Work) -> float:
        """Return the most tokens per second of sampling."""
        size, groups = num_weights(policy), -(-num_requests // GROUP)
        layers, kv_heads, head_dim = policy.cache_shape
        attended = groups * work.prompt_tokens + num_requests * work.tokens / 2
        read = (2 * size + 4 * layers * kv_heads * head_dim * attended) / self.read
        prefill = 2 * size * groups * work.prompt_tokens / self.multiplied
        return (
            num_requests * work.tokens / (prefill + work.tokens * max(read, 2 * size * num_requests / self.multiplied))
        )

    def share_of_update(self, policy: Policy, work: Work, seconds: float) -> float:
        """Return the share of the product rate. Operations are counted as in Ceiling.update_operations (ceiling.py)."""
        config, frozen = policy.module.config, not all(weight.requires_grad for weight in policy.module.parameters())
        of_weights = (4 if frozen else 6) * num_weights(policy) * useful_tokens(asdict(work))
        width = config.num_hidden_layers * config.num_attention_heads * policy.cache_shape[2]
        return (of_weights + 12 * width * seen_tokens(asdict(work))) / seconds / self.multiplied


def main() -> None:
    chosen = read_arguments()
    device = torch.device(chosen.device)
    policy = compute.submit(random_policy, chosen.shape, device).result()
    peak = Peak.measured(device)
    rows = [row for length in chosen.prompt_tokens for row in sampling(policy, length, peak, chosen)]
    if chosen.lora:
        compute.submit(add_adapters, policy, LoraConfig(rank=chosen.lora), seed=0).result()
    updates = {str(work): update(policy, work, peak, chosen) for work in chosen.updates}
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(policy.compute_dtype).removeprefix("torch."),
        "parameters": num_weights(policy),
        "product_rate_tflops": peak.multiplied / 1e12,
        "read_rate_gb": peak.read / 1e9,
        "sampling": rows,
        "updates": updates,
    }
    del policy
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if chosen.step:
        facts["step"] = grpo_step(chosen, device)
    most = rows[-1]
    Comparison(
        what=f"{chosen.shape} with random weights, {most['requests']} requests of {chosen.tokens} tokens after "
        f"{most['prompt_tokens']}",
        unit="tokens/s",
        ours=most["ours"],
        peers={"transformers": most["transformers"]} if chosen.peers else {},
        ceiling=most["ceiling"],
        facts=facts,
    ).print(chosen.json)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--requests", type=int, nargs="+", help="how many at once (1 32 256; on a CPU 1 8)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", help="of the requests (128 4096; on a CPU 64)")
    parser.add_argument("--tokens", type=int, help="of a response (128; on a CPU 8)")
    parser.add_argument(
        "--updates",
        type=Work.parse,
        nargs="*",
        help="PROMPTSxSAMPLESxPROMPT_TOKENS+TOKENS (16x8x128+128 1x4x512+8192; on a CPU 2x2x64+8)",
    )
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="updates learn adapters of this rank")
    parser.add_argument("--step", action="store_true", help="whole GRPO steps of the first update's size, too")
    parser.add_argument("--peers", action="store_true", help="transformers' generate and TRL's steps, too")
    parser.add_argument(
        "--one-by-one", action="store_true", help="the engine that reads each step before the next, too"
    )
    parser.add_argument("--token-budget", type=int, default=16_384, help="of one forward pass")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts; one more comes before them")
    add_trl_arguments(parser)
    chosen = parser.parse_args()
    on_gpu = chosen.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.exit(
            2, "torch finds no CUDA GPU on this machine; --device cpu --shape tiny tries the benchmark itself\n"
        )
    chosen.requests = chosen.requests or ([1, 32, 256] if on_gpu else [1, 8])
    chosen.prompt_tokens = chosen.prompt_tokens or ([128, 4096] if on_gpu else [64])
    chosen.tokens = chosen.tokens or (128 if on_gpu else 8)
    if chosen.updates is None:
        chosen.updates = [Work(16, 8, 128, 128), Work(1, 4, 512, 8192)] if on_gpu else [Work(2, 2, 64, 8)]
    if chosen.step and (chosen.lora or not chosen.updates):
        parser.error("--step trains all weights on work of the first update's size: name one, and leave --lora out")
    return chosen


def num_weights(policy: Policy) -> int:
    """Return the number of the model's own weights, adapters left out."""
    return sum(weight.numel() for name, weight in policy.module.named_parameters() if "lora_" not in name)


def sampling(policy: Policy, length: int, peak: Peak, chosen: argparse.Namespace) -> list[dict[str, float]]:
    """Return tokens per second for each number of requests with prompts of this length."""
    rows = []
    for number in chosen.requests:
        work = Work(-(-number // GROUP), GROUP, length, chosen.tokens)
        row: dict[str, float] = {"requests": number, "prompt_tokens": length}
        if chosen.peers:
            row["transformers"] = transformers_tokens_per_second(policy, number, work, chosen.rounds)
        row["ours"] = tokens_per_second(policy, number, work, chosen.rounds)
        if chosen.one_by_one:
            row["one_by_one"] = tokens_per_second(policy, number, work, chosen.rounds, ahead=False)
        row["ceiling"] = peak.sampled(policy, number, work)
        rows.append(row | {"share_of_ceiling": row["ours"] / row["ceiling"]})
    return rows


def tokens_per_second(policy: Policy, num_requests: int, work: Work, rounds: int, *, ahead: bool = True) -> float:
    """Return the tokens per second of the engine with this many concurrent requests."""
    engine = TorchEngine(policy, tiny_tokenizer(), max_num_seqs=num_requests, max_num_batched_tokens=8192)
    if not ahead:
        vars(engine._scheduler)["_start_ahead"] = lambda step: None
    asked = prompts(tiny_tokenizer(), work.num_prompts, work.prompt_tokens)
    calls = count()

    async def rollout() -> None:
        call = next(calls)
        requests = [
            Request(
                asked[i // GROUP],
                SamplingParams(work.tokens, min_tokens=work.tokens, seed=num_requests * call + i),
                f"{call}-{i}",
            )
            for i in range(num_requests)
        ]
        await asyncio.gather(*map(engine.generate, requests))
        await asyncio.gather(*(engine.forget(request.session_id) for request in requests))

    with asyncio.Runner() as runner:
        what = f"{num_requests} requests of {work.tokens} tokens after {work.prompt_tokens}"
        seconds = timed(lambda: runner.run(rollout()), rounds, what)
        runner.run(engine.close())
    return num_requests * work.tokens / seconds


def transformers_tokens_per_second(policy: Policy, num_requests: int, work: Work, rounds: int) -> float:
    """Return the tokens per second of `generate` with PyTorch's attention, at temperature 1, on one batch."""
    asked = prompts(tiny_tokenizer(), work.num_prompts, work.prompt_tokens)
    ids = torch.tensor([asked[i // GROUP] for i in range(num_requests)], device=policy.device)
    module: Any = copy.deepcopy(policy.module)
    for part in module.modules():
        vars(part).pop("forward", None)  # transformers' own again
    module.set_attn_implementation("sdpa")

    def generate() -> None:
        length = {"min_new_tokens": work.tokens, "max_new_tokens": work.tokens}
        module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **length)

    what = f"transformers, {num_requests} requests of {work.tokens} tokens after {work.prompt_tokens}"
    return num_requests * work.tokens / compute.submit(timed, generate, rounds, what).result()


def update(policy: Policy, work: Work, peak: Peak, chosen: argparse.Namespace) -> dict[str, float]:
    """Return seconds and useful tokens per second of the learner's update, its share of the peak, and its memory."""
    settings = asdict(work)
    config = TrainerConfig(
        algorithm=AlgorithmConfig(use_kl_loss=False),
        train_batch_size=work.num_prompts,
        policy_mini_batch_size=work.num_prompts,
        max_tokens_per_microbatch=max(chosen.token_budget, work.prompt_tokens + work.tokens),
    )
    samples = batch(tiny_tokenizer(), settings)
    learner = compute.submit(TorchLearner, policy, config, num_training_steps=100).result()

    def once() -> Mapping[str, float]:
        return learner.update(add_advantages(learner.add_logprobs(samples), config.algorithm))

    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(policy.device)
    seconds = timed(lambda: compute.submit(once).result(), chosen.rounds, f"update of {work}")
    return {
        "seconds": seconds,
        "tokens_per_second": useful_tokens(settings) / seconds,
        "share_of_product_rate": peak.share_of_update(policy, work, seconds),
        "peak_gib": torch.cuda.max_memory_allocated(policy.device) / GIB if on_gpu else 0.0,
    }


def grpo_step(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the seconds of whole GRPO steps, ours and TRL's, one after the other: a GPU may not hold both."""
    work = chosen.updates[0]
    theirs = trl_settings(chosen)
    theirs["rows"] = min(theirs["rows"], work.num_prompts * work.samples)
    with tempfile.TemporaryDirectory() as folder:
        model = compute.submit(save_random_model, chosen.shape, Path(folder) / "model", device).result()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        settings = {"model": str(model), "folder": folder, "token_budget": chosen.token_budget, **asdict(work)}
        sides = [Worker("ours", project("ours_step"), settings)]
        if chosen.peers:
            sides.append(Worker("trl", project("trl_step", [TRL]), settings | theirs))
        results = {name: rows for side in sides for name, rows in timed_in_turn([side], chosen.rounds).items()}
    seconds = medians(results, lambda row: row["seconds"])
    return {
        "work": str(work),
        "seconds": seconds,
        "generation_seconds": medians(results, lambda row: row["generate"]),
        "ratio": {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"},
        "trl": theirs,
    }


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
