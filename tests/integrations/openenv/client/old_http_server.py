"""A small real server in the wire format of openenv-core 0.1.1: plain HTTP, one environment for every client.

Run with a listening socket's number; it echoes, as echo_env did in 2025.
"""

from __future__ import annotations

import socket
import sys
import time
import uuid
from typing import Any

import uvicorn
from fastapi import Body, FastAPI


class OldEchoEnvironment:
    def __init__(self) -> None:
        self.episode_id = ""
        self.step_count = 0

    def reset(self) -> dict[str, Any]:
        self.episode_id, self.step_count = str(uuid.uuid4()), 0
        observation = {"echoed_message": "Echo environment ready!", "message_length": 0}
        return {"observation": observation, "reward": 0.0, "done": False}

    def step(self, message: str) -> dict[str, Any]:
        if message.startswith("sleep "):
            time.sleep(float(message.removeprefix("sleep ")))
        self.step_count += 1
        observation = {"echoed_message": message, "message_length": len(message)}
        return {"observation": observation, "reward": 0.1 * len(message), "done": False}


def make_app() -> FastAPI:
    app, env = FastAPI(), OldEchoEnvironment()

    @app.post("/reset")
    async def reset(request: dict[str, Any] = Body(default={})) -> dict[str, Any]:  # noqa: B008
        return env.reset()

    @app.post("/step")
    async def step(request: dict[str, Any]) -> dict[str, Any]:
        return env.step(**request.get("action", request))

    @app.get("/state")
    async def state() -> dict[str, Any]:
        return {"episode_id": env.episode_id, "step_count": env.step_count}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    return app


app = make_app()  # for `uvicorn old_http_server:app`, as in the images of then

if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
