"""Start echo_env and the agent, each in a process of its own, and train the model that the agent asks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.openai_agent.episodes import rows
from skyrl_train.entrypoints.main_base import main

HERE = Path(__file__).resolve().parent
RUN_FOLDER = Path.home() / "ckpts" / "openai_agent"
NUM_TRAIN, NUM_VALIDATION = 64, 16
PATIENCE_S = 120
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
def served(*command: str) -> Generator[str]:
    """Run a server on a free port, and end it. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-m", *command, "--port", str(port))
    process = subprocess.Popen(command, cwd=HERE, env=with_repository(), stdout=subprocess.DEVNULL)
    try:
        wait_for(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def with_repository() -> dict[str, str]:
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Return once the port is answered. RuntimeError if the server ended, or takes too long."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"{process.args} does not answer (exit status {process.poll()})")


if __name__ == "__main__":
    with served("integrations.openenv", "serve", "echo_env") as echo:
        os.environ["ECHO_URL"] = echo  # the agent's process inherits it
        with served("uvicorn", "examples.openai_agent.agent:app", "--log-level", "warning") as agent:
            os.environ["AGENT_URL"] = agent
            status = main([*settings(), *sys.argv[1:]])
    sys.exit(status)
