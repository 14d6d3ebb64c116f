"""Seconds of a whole GRPO step, generation, rewards and update: ours and TRL's on the same work.

uv run python -m tests.benchmarks.step [--prompt-tokens 256] [--trl-dtype float32] [--trl-rows 8]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.ceiling import Ceiling
from tests.benchmarks.comparison import Comparison, medians
from tests.benchmarks.side_by_side import (
    TRL,
    Worker,
    add_trl_arguments,
    arguments,
    project,
    timed_in_turn,
    trl_settings,
)
from tests.benchmarks.update import seen_tokens, settings_of, useful_tokens

PARTS = ("generate", "fwd_logprobs_values_reward", "policy_train", "sync_weights")


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=64, prompt_tokens=50, token_budget=4096)
    add_trl_arguments(parser)
    chosen = parser.parse_args()
    model = resolve_model(chosen.model)
    ceiling = Ceiling(model, chosen.token_budget)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(chosen, model, Path(folder))
        workers = [Worker("ours", project("ours_step"), settings)]
        if not chosen.no_peers:
            workers.append(Worker("trl", project("trl_step", [TRL]), settings | trl_settings(chosen)))
        results = timed_in_turn(workers, chosen.rounds, ceiling.measure)
    seconds = medians(results, lambda row: row["seconds"])
    rows = chosen.num_prompts * chosen.samples
    sampled_s = rows * chosen.tokens / ceiling.decode_tokens_per_second(rows)
    trained_s = ceiling.update_seconds(useful_tokens(settings), seen_tokens(settings))
    ours = seconds.pop("ours")
    Comparison(
        what=f"GRPO step, {chosen.num_prompts} prompts of {chosen.prompt_tokens} tokens x {chosen.samples} samples x "
        f"{chosen.tokens} tokens",
        unit="s",
        ours=ours,
        peers=seconds,
        ceiling=sampled_s + trained_s,
        is_time=True,
        facts={
            "generation_s": medians(results, lambda row: row["generate"]),
            "ours_s": {part: medians(results, lambda row, part=part: row.get(part, 0.0))["ours"] for part in PARTS},
            "trl": trl_settings(chosen),
        },
    ).print(chosen.json)


if __name__ == "__main__":
    main()
