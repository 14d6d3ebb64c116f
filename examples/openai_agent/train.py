"""Start echo_env and the agent, each in a process of its own, and train the model that the agent asks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.openai_agent.episodes import rows
from skyrl_train.entrypoints.main_base import asks_for_help, main

HERE = Path(__file__).resolve().parent
RUN_FOLDER = Path.home() / "ckpts" / "openai_agent"
NUM_TRAIN, NUM_VALIDATION = 64, 16
SETTINGS = (
    "generator.agent=examples.openai_agent.episodes:play",
    "trainer.policy.model.path=HuggingFaceTB/SmolLM2-135M-Instruct",
    "trainer.policy.optimizer_config.lr=2e-5",
    "trainer.algorithm.use_kl_loss=false",
    "trainer.train_batch_size=4",
    "trainer.policy_mini_batch_size=4",
    "trainer.ckpt_interval=100",
    "trainer.gradient_checkpointing=false",
    "generator.n_samples_per_prompt=8",
    "generator.sampling_params.max_generate_length=24",
)


def settings() -> list[str]:
    """Return the settings, with the paths of data and results."""
    return [
        *SETTINGS,
        f"data.train_data=['{data_file('train', rows(NUM_TRAIN, seed=0))}']",
        f"data.val_data=['{data_file('validation', rows(NUM_VALIDATION, seed=1))}']",
        f"trainer.ckpt_path={RUN_FOLDER}",
        f"trainer.export_path={RUN_FOLDER}/exports",
    ]


def data_file(name: str, made: list[dict[str, Any]]) -> Path:
    path = RUN_FOLDER / "data" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@contextmanager
def running(*command: str, **how: Any) -> Generator[subprocess.Popen[str]]:
    """Run a module of Python, and end it."""
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=HERE, env=environment, text=True, **how)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def echo_env() -> Generator[str]:
    """Serve echo_env. Yields its address, which is the first line that it prints."""
    with running("integrations.openenv", "serve", "echo_env", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"echo_env did not start (exit status {process.wait()})")
        yield json.loads(line)["url"]


@contextmanager
def agent() -> Generator[str]:
    """Serve the agent at a socket that is open before it starts, so that its first calls wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number, address = listening.fileno(), f"http://127.0.0.1:{listening.getsockname()[1]}"
        app = ("uvicorn", "examples.openai_agent.agent:app", "--log-level", "warning", "--fd", str(number))
        with running(*app, pass_fds=[number]):
            listening.close()  # the agent's alone from now on: if it ends, calls are refused
            yield address


def train(words: list[str]) -> int:
    """Train between the start and the end of both servers, and return the exit status."""
    with echo_env() as os.environ["ECHO_URL"], agent() as os.environ["AGENT_URL"]:  # the agent inherits the first
        return main([*settings(), *words])


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words) if asks_for_help(words) else train(words))
