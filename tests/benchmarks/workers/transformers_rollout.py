"""transformers: generate on one padded batch, sampling at temperature 1 with a dynamic cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.workers.prompts import prompts
from tests.benchmarks.workers.turns import serve


def prepare(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).to(device).eval()
    asked = prompts(tokenizer, settings["num_prompts"], settings["prompt_tokens"])
    ids = torch.tensor([ids for ids in asked for _ in range(settings["samples"])], device=device)
    num_tokens = settings["tokens"]

    def rollout() -> dict[str, Any]:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
        return {"tokens": out.shape[0] * (out.shape[1] - ids.shape[1])}

    return rollout


if __name__ == "__main__":
    serve(prepare)
