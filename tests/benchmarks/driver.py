"""Episodes at once in one driver: turns per second, memory and delay of the event loop, with nothing to wait for.

    python -m tests.benchmarks.driver [--episodes 64 512] [--environment threaded] [--beside TREE] [--rounds 3]

The real collector, chat template and tokenizer play groups of eight episodes of eight turns. The engine replies and the
environment answers at once, so what is timed is the driver. Each number of episodes is played in a process of its own.
`--environment threaded` is one with a plain `step`, which is called in a thread. `--beside` plays the same with another
checkout of the project, each first in every second round. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TURNS, SAMPLES, REPLY_TOKENS = 8, 8, 32
LOOK_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[64, 512, 4096, 16384])
    parser.add_argument("--environment", choices=["awaited", "threaded"], default="awaited")
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--play", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.play:
        print(json.dumps(played(chosen.play, chosen.environment)))
        return
    trees = {"ours": ROOT} | ({"beside": chosen.beside.resolve()} if chosen.beside else {})
    found: dict[str, Any] = {}
    for num_episodes in chosen.episodes:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for number in range(chosen.rounds):
            for name in sorted(trees, reverse=number % 2 == 1):
                rows[name].append(in_a_process(trees[name], num_episodes, chosen.environment))
        for name, its in rows.items():
            medians = {key: median(row[key] for row in its) for key in its[0]}
            found[f"{name}_{num_episodes}"] = medians
            print(
                f"{name:6} {num_episodes:6} episodes: {medians['turns_per_s']:7,.0f} turns/s, "
                f"{medians['turns_per_cpu_s']:,.0f} per second of a core, {medians['gb']:.2f} GB, "
                f"delay p99 {medians['delay_p99_ms']:.0f} ms, longest {medians['delay_max_ms']:.0f} ms",
                flush=True,
            )
    print(json.dumps(found))


def in_a_process(tree: Path, num_episodes: int, environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--play", str(num_episodes), "--environment", environment]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def played(num_episodes: int, environment: str) -> dict[str, float]:
    """Play one round, after a small one to warm up, and return what it took."""
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
    import numpy
    from loguru import logger
    from transformers import AutoTokenizer

    import skyrl_gym
    from skyrl_gym.envs.base_text_env import BaseTextEnv
    from skyrl_train.engine.base import Completion, Request, SamplingParams
    from skyrl_train.policy.pretrained import resolve_model
    from skyrl_train.rollout.chat import ChatTemplate
    from skyrl_train.rollout.collector import Collector
    from skyrl_train.rollout.round import Round
    from skyrl_train.rollout.task import EpisodeLimits
    from skyrl_train.types import Prompt

    logger.remove()
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("auto"))
    assert tokenizer is not None
    end = int(tokenizer.eos_token_id)

    class AtOnce:
        """Replies with random tokens after every other task that is ready has had its turn."""

        max_model_len, busy_seconds = 1 << 20, 0.0
        ids = numpy.random.default_rng(0).integers(1000, 40_000, 200_000)
        logprobs = -numpy.random.default_rng(1).exponential(1.0, 200_000)

        async def generate(self, request: Request) -> Completion:
            await asyncio.sleep(0)
            first = request.sampling.seed % 100_000
            ids = [*self.ids[first : first + REPLY_TOKENS - 1].tolist(), end]
            return Completion(f"reply {ids[0]}", ids, self.logprobs[first : first + REPLY_TOKENS].tolist(), "stop", 0)

        async def forget(self, session_id: str) -> None:
            pass

    class Lamps(BaseTextEnv):
        """Answers each turn with words that no other turn gets."""

        def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
            super().__init__()
            self.words = f"the lamp of {extras['seed']} is red after"

        def step(self, action: str) -> Any:
            self.turns += 1
            return {
                "observations": [{"role": "user", "content": f"{self.words} {action} in turn {self.turns}"}],
                "reward": 0.125,
                "done": self.turns == TURNS,
                "metadata": {},
            }

    class AwaitedLamps(Lamps):
        async def step_async(self, action: str) -> Any:
            return self.step(action)

    skyrl_gym.register(id="lamps", entry_point=AwaitedLamps if environment == "awaited" else Lamps)
    limits = EpisodeLimits(
        max_turns=TURNS, max_input_length=1 << 19, max_context=1 << 20, step_timeout_s=600, episode_timeout_s=600
    )
    collector = Collector(AtOnce(), ChatTemplate(tokenizer), limits, env_configs={})  # ty: ignore[invalid-argument-type]
    question = [{"role": "user", "content": "Which lamp is red? Think about it and say its name. " * 8}]
    prompts = [Prompt(str(uid), question, "lamps") for uid in range(num_episodes // SAMPLES)]

    def asked(step: int, num_prompts: int) -> Round:
        return Round("train", step, prompts[:num_prompts], SAMPLES, SamplingParams(max_tokens=64))

    async def play() -> dict[str, float]:
        await collector.collect(asked(1, 8))
        delays: list[float] = []
        looking = asyncio.create_task(look(delays))
        began, began_cpu = time.perf_counter(), time.process_time()
        groups = await collector.collect(asked(2, len(prompts)))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        await asyncio.sleep(0)
        looking.cancel()
        turns = sum(len(episode.turns) for group in groups for episode in group.trajectories)
        assert turns == num_episodes * TURNS
        return {
            "turns_per_s": turns / seconds,
            "turns_per_cpu_s": turns / cpu_seconds,
            "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "delay_p99_ms": 1000 * sorted(delays)[int(0.99 * len(delays))],
            "delay_max_ms": 1000 * max(delays),
        }

    return asyncio.run(play())


async def look(delays: list[float]) -> None:
    """Measure again and again how much later than asked for the event loop wakes a task."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LOOK_S)
        delays.append(time.perf_counter() - began - LOOK_S)


if __name__ == "__main__":
    main()
