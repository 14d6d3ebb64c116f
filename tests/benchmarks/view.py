"""First paint and filters of `skyrl view` on many runs: `python -m tests.benchmarks.view --folder /tmp/runs`.

Writes runs in the trainer's own format (once; the folder can be used again), starts the command, waits until every file
is in the index, and asks a headless Chromium how long a person waits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import zstandard

from skyrl_train.run.records.episode import EpisodeRecord, Segment, TurnRecord
from skyrl_train.run.records.trajectories import _end, trajectory_path
from skyrl_train.types import EpisodeEnd
from tests.browser import Browser, headless_browser

WORDS = ["red", "green", "move", "left", "right", "board", "score", "answer", "the", "a", "therefore", "7", "<b>"]
ENDS = [EpisodeEnd.FINISHED] * 6 + [EpisodeEnd.OUT_OF_TURNS, EpisodeEnd.OUT_OF_TOKENS]
FILTERS: list[dict[str, Any]] = [
    {"text": "therefore"}, {"text": "left board"}, {"text": '"move left"'}, {"reward_from": 0.9},
    {"step_from": 500, "step_to": 900, "end": "out_of_tokens"}, {"sort": "-reward"}, {"prompt": "17"}, {"text": "t"},
]  # fmt: skip


def episode(rng: random.Random, tokens: int) -> EpisodeRecord:
    segments, turns = [], []
    for turn in range(2):
        for sampled in (False, True):
            texts = [f"{rng.choice(WORDS)} " for _ in range(tokens // 4)]
            ids = [rng.randrange(49_152) for _ in texts]
            logprobs = [round(-rng.expovariate(2), 6) for _ in texts] if sampled else []
            segments.append(Segment(sampled, turn, turn == 0 and not sampled, ids, texts, logprobs))
        heard = [{"role": "user", "content": f"you see {rng.choice(WORDS)}"}]
        turns.append(TurnRecord(rng.random() / 2, segments[-1].text, "stop", 1, heard))
    asked = [{"role": "user", "content": f"task: {segments[0].text}"}]
    reward = sum(turn.reward for turn in turns)
    return EpisodeRecord(
        "train", 1, "0", 0, "bench", "bench_env", {"row": 1}, 1, asked, turns, segments, reward,
        rng.choice(ENDS), "stop", {"won": rng.random()}, 1, None, rng.random(),
    )  # fmt: skip


def write_run(folder: Path, seed: int, steps: int, episodes: int, tokens: int) -> None:
    """Write metrics of every step, and the episodes in as many steps as they fill in groups of eight."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    run = {"model": "bench", "environment": "bench_env", "device": "cpu", "total_steps": steps}
    (folder / "run.json").write_text(json.dumps(run | {"changed": {"trainer.seed": [seed, 42]}}))
    others = [json.dumps({f"metric/{i}": rng.random() for i in range(40)}) for _ in range(64)]  # chosen from, for speed
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "time": 1.7e9 + seed * 1e4 + step, "elapsed_s": float(step)}
            line["reward/avg_raw_reward"] = rng.random()
            if step % 50 == 0:
                line["eval/all/avg_score"] = step / steps + rng.random() / 5
            file.write(f"{json.dumps(line)[:-1]}, {rng.choice(others)[1:]}\n")
    pool = [episode(rng, tokens).to_json() for _ in range(300)]
    files = min(steps, -(-episodes // 8))
    for number in range(files):
        step = 1 + number * steps // files
        phase = "eval" if number % 20 == 0 else "train"
        lines = [
            played_at(rng.choice(pool), phase, step, (number + i // 8) % 64, i % 8)
            for i in range(len(range(number, episodes, files)))
        ]
        path = trajectory_path(folder, phase, step)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zstandard.compress("".join(lines).encode(), 3) + _end(len(lines)))


def played_at(line: str, phase: str, step: int, uid: int, repetition: int) -> str:
    """Return an episode of the pool, played by another prompt at another step: much faster than a new one."""
    head = f'{{"phase":"{phase}","step":{step},"uid":"{uid}","repetition":{repetition}'
    return head + line[line.index(',"data_source"') :] + "\n"


def generate(folder: Path, runs: int, steps: int, episodes: int, tokens: int) -> None:
    """Half of the episodes lie in the first run, the others share the rest."""
    write_run(folder / "run_000", 0, steps, episodes // 2, tokens)
    for number in range(1, runs):
        write_run(folder / f"run_{number:03d}", number, steps, episodes // 2 // (runs - 1), tokens)


def measure(address: str, browser: Browser) -> dict[str, Any]:
    """Return milliseconds, medians of five: of the first paint of the table and of an episode list, and of filters."""
    rows = ask(f"{address}/api/runs")["rows"]
    largest = max(rows, key=lambda row: row["episodes"])["id"]
    table = [painted(browser, address, "document.querySelector('.row .spark-line')") for _ in range(5)]
    lists = [
        painted(browser, f"{address}/#/run/{largest}/episodes", "document.querySelector('.row .pill')")
        for _ in range(5)
    ]
    filters = {json.dumps(f): filtered(browser, address, largest, f) for f in FILTERS}
    return {
        "runs": len(rows), "episodes": sum(row["episodes"] for row in rows),
        "in the largest run": max(row["episodes"] for row in rows),
        "first paint, table": round(statistics.median(table)),
        "first paint, episodes": round(statistics.median(lists)), "filters": filters,
        "slowest filter": max(filters.values()),
    }  # fmt: skip


def painted(browser: Browser, address: str, there: str) -> float:
    """Return the milliseconds from the navigation to the first row on the screen."""
    browser.call("Page.navigate", url="about:blank")
    browser.call("Page.navigate", url=address)
    browser.until("location.protocol === 'http:'")
    return browser.run(
        f"new Promise((done) => {{ const look = () => ({there}) ? requestAnimationFrame(() => done(performance.now())) "
        ": requestAnimationFrame(look); look(); })"
    )


def filtered(browser: Browser, address: str, run: str, question: dict[str, Any]) -> int:
    """Return the milliseconds that the page waits for a filter's answer, the slowest of three."""
    path = f"/api/runs/{run}/episodes?{urlencode(question | {'limit': 100})}"
    script = (
        "(async () => { const begun = performance.now(); "
        f"await (await fetch('{path}')).json(); return performance.now() - begun; }})()"
    )
    return round(max(browser.run(script) for _ in range(3)))


def ask(address: str) -> Any:
    with urlopen(address, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs lie, or are written")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=120, help="of an episode")
    options = parser.parse_args()
    if not options.folder.exists():
        generate(options.folder, options.runs, options.steps, options.episodes, options.tokens)
    command = [sys.executable, "-m", "skyrl_train.view", str(options.folder), "--no-open", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        assert server.stdout is not None
        try:
            server.stdout.readline()
            show(server.stdout.readline().split()[0])
        finally:
            server.terminate()


def show(address: str) -> None:
    begun = time.monotonic()
    with headless_browser() as browser:
        browser.size(1280, 800)
        first = painted(browser, address, "document.querySelector('.row')")
        print("first paint while files are read, ms:", round(first))
        while ask(f"{address}/api/state")["unread"]:
            time.sleep(1)
        print(f"the index was complete after {time.monotonic() - begun:.1f} s", flush=True)
        print(json.dumps(measure(address, browser), indent=1))


if __name__ == "__main__":
    main()
