"""TRL: from its command to the first token of its first step, in the same task."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    stages = {"python": time.time()}
    from tests.benchmarks.workers.echo import rewards, rows
    from tests.benchmarks.workers.trl import GRPOTrainer, make_trainer
    from tests.benchmarks.workers.turns import NoMoreTurns, settings

    stages["imports"] = time.time()

    class UpToFirstToken(GRPOTrainer):
        """Trainer that samples one token per prompt and stops."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            stages["model and trainer"] = time.time()
            super()._generate_single_turn(*args, **kwargs)
            stages["first token"] = time.time()
            print(json.dumps({"stages": stages}), flush=True)
            raise NoMoreTurns

    try:
        make_trainer(settings() | {"tokens": 1}, rows(), rewards, UpToFirstToken).train()
    except NoMoreTurns:
        sys.exit(0)


if __name__ == "__main__":
    main()
