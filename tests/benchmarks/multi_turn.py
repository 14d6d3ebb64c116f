"""Benchmark of eight-turn episodes with an environment that answers in 50 ms: engine load and recomputed tokens.

uv run python -m tests.benchmarks.multi_turn [--turns 8] [--tokens 24]

The real collector and environment threads. `ours` is the share of the rollout's time in which the engine computed; its
ceiling is 1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.comparison import Comparison, medians
from tests.benchmarks.side_by_side import Worker, arguments, project, timed_in_turn
from tests.benchmarks.update import settings_of


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=24, prompt_tokens=50, turns=8, token_budget=2048)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {**settings_of(chosen, resolve_model(chosen.model), Path(folder)), "turns": chosen.turns}
        results = timed_in_turn([Worker("ours", project("ours_multi_turn"), settings)], chosen.rounds)
    Comparison(
        what=f"{chosen.turns} turns of {chosen.tokens} tokens, {chosen.num_prompts} prompts x {chosen.samples}",
        unit="share of the time in which the engine computes",
        ours=medians(results, lambda row: row["busy_share"])["ours"],
        peers={},
        ceiling=1.0,
        facts={
            "prompt_tokens_over_least": medians(results, lambda row: row["prompt_tokens"] / row["least_prompt_tokens"])[
                "ours"
            ],
            "seconds": medians(results, lambda row: row["seconds"])["ours"],
            "tokens_per_second": medians(results, lambda row: row["tokens"] / row["seconds"])["ours"],
        },
    ).print(chosen.json)


if __name__ == "__main__":
    main()
