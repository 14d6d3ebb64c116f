"""Ours: main_openenv as run_openenv.sh starts it, up to the first sampled token. Reports the time of each stage."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

STAGES: dict[str, float] = {}  # name: seconds since the epoch


def reached(stage: str) -> None:
    STAGES[stage] = time.time()


def main() -> int:
    reached("python")
    from integrations.openenv.entrypoints.main_openenv import OpenEnvExp
    from tests.benchmarks.workers.openenv import train

    reached("configuration modules")

    class Watched(OpenEnvExp):
        """An experiment that reports the time of each stage."""

        def get_tokenizer(self, padding_side: str | None = None) -> Any:
            reached("imports, device, model's folder")
            tokenizer = super().get_tokenizer()
            reached("tokenizer")
            return tokenizer

        def get_eval_dataset(self) -> Any:
            dataset = super().get_eval_dataset()
            reached("data sets")
            return dataset

        def get_policy(self) -> Any:
            reached("environments, run folder")
            policy = super().get_policy()
            reached("model")
            return policy

        def get_engine(self, policy: Any) -> Any:
            engine = super().get_engine(policy)
            reached("engine")
            threading.Thread(target=report_first_token, args=(engine,), daemon=True).start()
            return engine

        def build_trainer(self, run: Any) -> Any:
            trainer = super().build_trainer(run)
            reached("learner")
            return trainer

    return train(Watched)


def report_first_token(engine: Any) -> None:
    """Wait for the first sampled token and report it. Training goes on until the benchmark ends the process."""
    while engine.stats().tokens_sampled == 0:
        time.sleep(0.01)
    reached("first token")
    print(json.dumps({"stages": STAGES}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
