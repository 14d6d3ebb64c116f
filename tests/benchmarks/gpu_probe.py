"""The first thing to run on a GPU that nobody has used with this project: what it is, and where the time goes.

uv run --extra cuda python -m tests.benchmarks.gpu_probe facts attention profile
uv run python -m tests.benchmarks.gpu_probe --device cpu attention profile      (tries the script itself)

One JSON object a line, and a table of the kernels for `profile`. A part that fails ends the run: start the next ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from skyrl_train import compute
from skyrl_train.engine.torch.forward import computes_in_pages
from skyrl_train.engine.torch.paged_cache import PAGE_SIZE
from skyrl_train.ops import cuda
from skyrl_train.ops.ragged import Ragged
from tests.benchmarks import gpu
from tests.benchmarks.shapes import random_policy

HEADS = {"0.5B": (14, 2, 64), "7B": (28, 4, 128)}  # heads, kv_heads, D


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "torch finds no CUDA GPU on this machine; --device cpu tries the script itself\n")
    for name in chosen.parts:
        PARTS[name](device)


def say(**facts: Any) -> None:
    print(json.dumps(facts, default=str), flush=True)


def milliseconds(work: Callable[[], object], device: torch.device, times: int = 10) -> dict[str, float]:
    """Return the time of the first call, which may compile or plan, and the median of the others."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1e3 * (time.perf_counter() - began))
    return {"first": round(taken[0], 2), "median": round(sorted(taken[1:])[times // 2], 4)}


def facts(device: torch.device) -> None:
    """Say what the GPU is, what is installed, and how fast it multiplies and reads."""
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
        free, total = torch.cuda.mem_get_info(device)
        capability = torch.cuda.get_device_capability(device)
        say(nvidia_smi=subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())
        say(capability=capability, free_gib=round(free / gpu.GIB, 1), total_gib=round(total / gpu.GIB, 1))
    say(torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0])
    say(**{name: installed(name) for name in ("triton", "liger-kernel", "transformers", "bitsandbytes", "vllm")})
    peak = gpu.Peak.measured(device)
    say(product_tflops=round(peak.multiplied / 1e12, 2), read_gb=round(peak.read / 1e9))
    policy = policy_on(device)
    flash = cuda.has_flash(device, policy.compute_dtype, policy.cache_shape[2])
    say(flash=flash, fused_blocks=cuda.has_fused_blocks(), pages=computes_in_pages(policy))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def attention(device: torch.device) -> None:
    """Time attention over pages: one new token a row, and prompts of 512 tokens behind what is cached."""
    dtype, sizes = (torch.bfloat16, ((1, 8192), (32, 2048), (256, 512)))
    if device.type == "cpu":
        dtype, sizes = torch.float32, ((2, 300),)
    for name, (heads, kv_heads, dim) in HEADS.items():
        for rows, length in sizes:
            count = -(-length // PAGE_SIZE)
            store = torch.randn(2, rows * count + 1, PAGE_SIZE, kv_heads, dim, device=device).to(dtype)
            pages = 1 + torch.randperm(rows * count, device=device).view(rows, count).int()
            used = torch.full((rows,), length, device=device)
            scale: Any = {"scale": dim**-0.5, "window": None}
            for new in (1, min(512, length)):
                query = torch.randn(rows * new, heads, dim, device=device).to(dtype)
                ragged = Ragged.of([new] * rows, [length] * rows, device, pages)
                took = milliseconds(
                    lambda q=query, r=ragged, s=store, o=scale: cuda.paged_attention(q, *s, r, **o), device
                )
                say(attention=name, rows=rows, length=length, new=new, milliseconds=took)
            query = torch.randn(rows, heads, dim, device=device).to(dtype)
            took = milliseconds(
                lambda q=query, u=used, p=pages, s=store, o=scale: cuda.decode_attention(q, *s, u, p, **o), device
            )
            say(attention=name, rows=rows, length=length, own_kernel=took)


def profile(device: torch.device) -> None:
    """Print the kernels of an update and of a rollout, the slowest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    on_gpu = device.type == "cuda"
    size, requests = (gpu.Work(8, 8, 128, 64), 256) if on_gpu else (gpu.Work(1, 8, 128, 8), 4)
    chosen = argparse.Namespace(token_budget=16384, rounds=1)
    peak = gpu.Peak.measured(device)
    policy = policy_on(device)
    works: dict[str, Callable[[], object]] = {
        "update": lambda: gpu.update(policy, size, peak, chosen),
        "rollout": lambda: gpu.tokens_per_second(
            policy, requests, gpu.Work(-(-requests // gpu.GROUP), gpu.GROUP, 128, size.tokens), 1
        ),
    }
    for name, work in works.items():
        work()
        with profiled(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
            work()
        averages = found.key_averages()
        launches = sum(event.count for event in averages if "LaunchKernel" in event.key)
        say(profile=name, launches=launches, synchronised=sum(e.count for e in averages if "Synchronize" in e.key))
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(averages.table(sort_by=order, row_limit=25, max_name_column_width=70), flush=True)


def policy_on(device: torch.device) -> Any:
    shape = "qwen2.5-0.5b" if device.type == "cuda" else "tiny"
    return compute.submit(random_policy, shape, device).result()


PARTS: dict[str, Callable[[torch.device], None]] = {"facts": facts, "attention": attention, "profile": profile}

if __name__ == "__main__":
    main()
