"""Tokens per second of an update on the same samples: ours and TRL's; or how ours grows with the batch.

uv run python -m tests.benchmarks.update [--prompt-tokens 256] [--trl-dtype float32] [--trl-rows 8]
uv run python -m tests.benchmarks.update --check-linear

Useful tokens count: each prompt of a group once, and every response. The ceiling is the machine's bf16 product rate,
the operations are those that these tokens need.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.ceiling import Ceiling
from tests.benchmarks.comparison import Comparison, machine, medians
from tests.benchmarks.side_by_side import (
    TRL,
    Worker,
    add_trl_arguments,
    arguments,
    project,
    timed_in_turn,
    trl_settings,
)

GIB = 1 << 30


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=64, prompt_tokens=50, token_budget=4096)
    add_trl_arguments(parser)
    parser.add_argument("--check-linear", action="store_true", help="ours alone, with 1, 2 and 4 times the prompts")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (growth if chosen.check_linear else against_trl)(chosen, Path(folder))


def against_trl(chosen: argparse.Namespace, folder: Path) -> None:
    model = resolve_model(chosen.model)
    ceiling = Ceiling(model, chosen.token_budget)
    settings = settings_of(chosen, model, folder)
    workers = [Worker("ours", project("ours_update"), settings)]
    if not chosen.no_peers:
        workers.append(Worker("trl", project("trl_update", [TRL]), settings | trl_settings(chosen)))
    results = timed_in_turn(workers, chosen.rounds, ceiling.measure)
    num_tokens, num_seen = useful_tokens(settings), seen_tokens(settings)
    rates = medians(results, lambda row: num_tokens / row["seconds"])
    ours = rates.pop("ours")
    achieved = ceiling.update_operations(num_tokens, num_seen) * ours / num_tokens
    Comparison(
        what=f"update, {chosen.num_prompts} prompts of {chosen.prompt_tokens} tokens x {chosen.samples} samples x "
        f"{chosen.tokens} tokens",
        unit="useful tokens/s",
        ours=ours,
        peers=rates,
        ceiling=num_tokens / ceiling.update_seconds(num_tokens, num_seen),
        facts={
            "seconds": medians(results, lambda row: row["seconds"]),
            "grad_norm": {name: rows[0]["grad_norm"] for name, rows in results.items()},
            "product_rate_gflops": ceiling.product_rate / 1e9,
            "product_rate_of_own_shapes_gflops": ceiling.own_product_rate / 1e9,
            "share_of_own_shapes": achieved / ceiling.own_product_rate,
            "cores": medians(results, lambda row: row["cores"]),
            "trl": trl_settings(chosen),
        },
    ).print(chosen.json)


def growth(chosen: argparse.Namespace, folder: Path) -> None:
    """Compare 1, 2 and 4 times the prompts at one token budget: time should double and memory stay constant."""
    model = resolve_model(chosen.model)
    workers = []
    for times in (1, 2, 4):
        own = folder / str(times)
        own.mkdir()
        settings = {**settings_of(chosen, model, own), "num_prompts": times * chosen.num_prompts}
        workers.append(Worker(str(times), project("ours_update"), settings))
    results = timed_in_turn(workers, chosen.rounds)
    seconds = medians(results, lambda row: row["seconds"])
    peak = {name: rows[-1]["peak_bytes"] / GIB for name, rows in results.items()}
    outcome = {
        "what": f"update of 1, 2 and 4 times {chosen.num_prompts} prompts of {chosen.prompt_tokens} tokens x "
        f"{chosen.samples} samples x {chosen.tokens} tokens, token budget {chosen.token_budget}",
        "seconds": seconds,
        "peak_gib": peak,
        "time_ratio_of_twice": median(
            two["seconds"] / one["seconds"] for one, two in zip(results["1"], results["2"], strict=True)
        ),
        "memory_ratio_of_four_times": peak["4"] / peak["1"],
        "machine": machine(),
    }
    if not chosen.json:
        print(outcome["what"])
        for times in seconds:
            print(f"  {times} times: {seconds[times]:6.2f} s, at most {peak[times]:.2f} GiB")
    print(json.dumps(outcome))


def settings_of(chosen: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    names = ("num_prompts", "samples", "tokens", "prompt_tokens", "token_budget")
    return {"model": str(model), "folder": str(folder), **{name: getattr(chosen, name) for name in names}}


def useful_tokens(settings: dict[str, Any]) -> int:
    return settings["num_prompts"] * (settings["prompt_tokens"] + settings["samples"] * settings["tokens"])


def seen_tokens(settings: dict[str, Any]) -> int:
    """Return the sum over useful tokens of the number of tokens that each attends to, itself included."""
    prompt, tokens = settings["prompt_tokens"], settings["tokens"]
    attended = settings["samples"] * (tokens * prompt + tokens * (tokens + 1) // 2)
    return settings["num_prompts"] * (prompt * (prompt + 1) // 2 + attended)


if __name__ == "__main__":
    main()
