"""vLLM, in an environment of its own: `python vllm_rollout.py SETTINGS`. Imports nothing of this project."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)  # by default it leaves one without work
    from vllm import LLM, SamplingParams, TokensPrompt

    settings: dict[str, Any] = json.loads(sys.argv[1])
    llm = LLM(
        settings["model"], dtype="bfloat16", max_model_len=2048, enable_prefix_caching=True, gpu_memory_utilization=0.5
    )
    num_tokens = settings["tokens"]
    sampling = SamplingParams(
        n=settings["samples"], temperature=1.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in settings["prompt_ids"]]

    def rollout() -> int:
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    rollout()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = rollout()
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
