from __future__ import annotations

import psutil
import pytest

from integrations.openenv.catalog.coding import CodeAction, CodeObservation
from integrations.openenv.catalog.echo import EchoAction
from integrations.openenv.clients import CodingEnv, EchoEnv
from integrations.openenv.hosting.docker_command import DockerUnavailable


async def test_a_local_environment_is_started_and_stopped_by_its_client() -> None:
    before = set(psutil.Process().children())
    async with await EchoEnv.local() as env:
        assert (await env.reset(seed=1)).observation.echoed is None
        assert (await env.step(EchoAction("hello"))).observation.echoed == "hello"
        assert (await env.state())["step_count"] == 1
        assert (await env.reset()).reward == 0.0
        assert (await env.state())["step_count"] == 0
    assert set(psutil.Process().children()) <= before  # one of another test may have ended meanwhile


def test_the_same_without_a_loop(coding_url: str) -> None:
    with CodingEnv.sync(CodingEnv.from_url(coding_url)) as env:
        env.reset()
        env.step(CodeAction("x = 3"))
        result = env.step(CodeAction("print(x * 2)"))
    assert result.observation == CodeObservation(stdout="6\n", stderr="", exit_code=0)
    assert (result.reward, result.done) == (0.1, False)


async def test_step_before_reset_is_a_mistake_of_the_caller(echo_url: str) -> None:
    with pytest.raises(RuntimeError, match=r"reset\(\) first"):
        await (await EchoEnv.from_url(echo_url)).step(EchoAction("hello"))


async def test_without_a_daemon_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(DockerUnavailable, match=r"no Docker here .* Start Docker, or do without: `local\(\)`"):
        await EchoEnv.from_docker_image()
