"""Seconds of a whole GRPO step, generation, rewards and update: ours and TRL's on the same work.

uv run python -m tests.benchmarks.step [--prompt-tokens 256] [--trl-dtype float32]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from skyrl_train.pretrained import resolve_model
from tests.benchmarks.ceiling import Ceiling, num_parameters
from tests.benchmarks.comparison import Comparison, medians
from tests.benchmarks.side_by_side import TRL, Worker, arguments, project, timed_in_turn
from tests.benchmarks.update import settings_of, useful_tokens


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=64, prompt_tokens=50, token_budget=2048)
    parser.add_argument("--trl-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of TRL's weights")
    chosen = parser.parse_args()
    model, ceiling = resolve_model(chosen.model), Ceiling()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(chosen, model, Path(folder))
        workers = [Worker("ours", project("ours_step"), settings)]
        if not chosen.no_peers:
            workers.append(Worker("trl", project("trl_step", [TRL]), {**settings, "dtype": chosen.trl_dtype}))
        results = timed_in_turn(workers, chosen.rounds, ceiling.measure)
    seconds = medians(results, lambda row: row["seconds"])
    size = num_parameters(model)
    rows = chosen.num_prompts * chosen.samples
    sampled_s = rows * chosen.tokens / ceiling.decode_tokens_per_second(size, rows)
    trained_s = useful_tokens(settings) / ceiling.update_tokens_per_second(size)
    least_s = sampled_s + trained_s
    ours = seconds.pop("ours")
    Comparison(
        what=f"GRPO step, {chosen.num_prompts} prompts of {chosen.prompt_tokens} tokens x {chosen.samples} samples x "
        f"{chosen.tokens} tokens",
        unit="s",
        ours=ours,
        peers=seconds,
        ceiling=least_s,
        is_time=True,
        facts={
            "generation_s": {name: rows["generate"] for name, rows in _median_rows(results).items()},
            "ours_s": _median_rows(results)["ours"],
            "trl_dtype": chosen.trl_dtype,
        },
    ).print(chosen.json)


def _median_rows(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Every number of every worker, by its median."""
    return {
        name: {key: medians({name: rows}, lambda row, key=key: row[key])[name] for key in rows[0]}
        for name, rows in results.items()
    }


if __name__ == "__main__":
    main()
