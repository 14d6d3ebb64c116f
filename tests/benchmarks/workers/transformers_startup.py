"""transformers, nothing else: import, load, one token."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    stages = {"python": time.time()}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages["imports"] = time.time()
    model_path = json.loads(sys.argv[-1])["model"]
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).to(device)
    stages["model"] = time.time()
    ids = tokenizer("The sea and a mountain", return_tensors="pt").to(device)
    model.generate(**ids, max_new_tokens=1, do_sample=True)
    stages["first token"] = time.time()
    print(json.dumps({"stages": stages}), flush=True)


if __name__ == "__main__":
    main()
