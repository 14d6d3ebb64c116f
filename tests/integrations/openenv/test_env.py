from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import skyrl_gym
from integrations.openenv.catalog import InvalidAction
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv, close_background_pools, register_openenv, with_observation
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool.server_pool import close_shared_pools, num_server_restarts, shared_pool
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.check import check_env
from skyrl_gym.core import EnvFailure
from skyrl_gym.envs.registration import deregister

PROMPT = [{"role": "user", "content": "Repeat: red lamp tree"}]


def echo_extras(**more: Any) -> dict[str, Any]:
    return {"env_name": "echo_env", "reward_spec": {"method": "rule", "ground_truth": "red lamp tree"}, **more}


def code_extras(output: str, **more: Any) -> dict[str, Any]:
    return {"env_name": "coding_env", "reward_spec": {"method": "rule", "ground_truth": output}, **more}


def example_rows() -> list[dict[str, Any]]:
    """One row of each environment that has no test file of its own."""
    rows = [row for row in OpenEnv.example_extras() if row["extra_info"]["index"] in (0, 3)]
    return [row for row in rows if row["env_name"] in ("echo_env", "coding_env")]


async def played(env: OpenEnv, *replies: str) -> list[Any]:
    try:
        await env.init_async(PROMPT)
        return [await env.step_async(reply) for reply in replies]
    finally:
        await env.close_async()
        await close_shared_pools()


@pytest.mark.parametrize("name", ["echo_env", "coding_env"])
async def test_the_known_solution_of_every_kind_of_task_earns_full_reward(
    name: str, echo_url: str, coding_url: str
) -> None:
    config = OpenEnvConfig(url={"echo_env": echo_url, "coding_env": coding_url}[name])
    rows, _ = dataset_rows(name, 12, 1, seed=3)
    assert len({row["extra_info"]["family"] for row in rows}) == {"echo_env": 1, "coding_env": 4}[name]
    for row in rows:
        env = OpenEnv(config, row)
        await env.init_async(row["prompt"])
        [gold] = env.gold_actions() or []
        output = await env.step_async(gold)
        await env.close_async()
        assert (output["reward"], output["done"], output["truncated"]) == (1.0, True, False), row
        assert env.get_metrics()["success"] is True
    await close_shared_pools()


async def test_a_bad_reply_is_explained_and_the_episode_goes_on(echo_url: str) -> None:
    env = OpenEnv(OpenEnvConfig(url=echo_url), echo_extras(max_turns=4))
    no_tag, open_tag, wrong, right = await played(
        env,
        "red lamp tree",
        "<action>red lamp tree",
        "<action>red lamp</action>",
        "<action>\nred lamp tree\n</action> and so on <action>blue</action>",
    )
    assert no_tag["observations"][0]["content"].startswith("There is no action in your reply")
    assert (no_tag["reward"], no_tag["done"]) == (0.0, False)
    assert open_tag["observations"][0]["content"] == "Your action does not end. Write </action> behind it."
    assert wrong["observations"][0]["content"] == "The environment said: red lamp\nThat is not right yet. Try again."
    assert wrong["reward"] == pytest.approx(16 / 21)
    assert right["observations"][0]["content"] == "The environment said: red lamp tree"
    assert right["reward"] == pytest.approx(5 / 21)  # the rest: the rewards of an episode add up to its best score
    assert (right["done"], right["truncated"]) == (True, False)
    assert right["metadata"]["observation"]["result"]["data"] == "red lamp tree"
    metrics = {"turns": 4, "invalid_actions": 2, "success": True, "score": 1.0, "server_reward": 0.0}
    assert env.get_metrics() == metrics


async def test_the_last_turn_is_truncated_unless_solved(echo_url: str) -> None:
    env = OpenEnv(OpenEnvConfig(url=echo_url), echo_extras(max_turns=1))
    [output] = await played(env, "<action>blue</action>")
    assert (output["done"], output["truncated"]) == (True, True)
    assert output["observations"]


async def test_a_penalty_for_unreadable_actions_is_the_tasks_choice(echo_url: str) -> None:
    env = OpenEnv({"url": echo_url, "invalid_action_penalty": 0.25}, echo_extras(max_turns=2))
    assert [output["reward"] for output in await played(env, "?", "<action>red lamp tree</action>")] == [-0.25, 1.0]


async def test_code_over_several_lines_reaches_the_server_and_its_own_reward_is_a_metric(coding_url: str) -> None:
    env = OpenEnv(OpenEnvConfig(url=coding_url), code_extras("10"))
    [output] = await played(
        env, "<action>\n```python\ntotal = 0\nfor i in range(5):\n    total += i\nprint(total)\n```</action>"
    )
    assert output["reward"] == 1.0
    assert env.get_metrics()["server_reward"] == pytest.approx(0.1)


async def test_parsing_is_overridden_in_one_place(echo_url: str) -> None:
    class Shouting(OpenEnv):
        def _get_openenv_action(self, env_name: str, action: str) -> dict[str, Any]:
            if not action.isupper():
                raise InvalidAction("Shout.")
            return self.translator.action(action.lower())

    env = Shouting(OpenEnvConfig(url=echo_url), echo_extras(max_turns=2))
    quiet, loud = await played(env, "<action>red lamp tree</action>", "<action>RED LAMP TREE</action>")
    assert quiet["observations"][0]["content"] == "Shout."
    assert loud["reward"] == 1.0


async def test_one_unreadable_action_too_many_ends_the_episode(echo_url: str) -> None:
    config = OpenEnvConfig(url=echo_url, max_invalid_actions=1, invalid_action_penalty=0.25)
    env = OpenEnv(config, echo_extras(max_turns=9))
    first, second = await played(env, "no tag", "nor here")
    assert (first["reward"], first["done"]) == (-0.25, False)
    assert (second["reward"], second["done"], second["truncated"]) == (-0.25, True, False)


async def test_fields_that_the_server_refuses_are_the_policys_fault(echo_url: str) -> None:
    class Wrong(OpenEnv):
        def _get_openenv_action(self, env_name: str, action: str) -> dict[str, Any]:
            return {"tool_name": 3}

    env = Wrong(OpenEnvConfig(url=echo_url), echo_extras())
    [output] = await played(env, "<action>x</action>")
    assert "tool_name: Input should be a valid string" in output["observations"][0]["content"]
    assert env.get_metrics()["invalid_actions"] == 1


def test_the_first_observation_reaches_the_model() -> None:
    shown = with_observation(PROMPT, "The program printed:\nready")
    assert shown[-1]["content"] == "Repeat: red lamp tree\n\nThe program printed:\nready"
    assert PROMPT[-1]["content"] == "Repeat: red lamp tree"


async def test_a_killed_server_is_an_env_failure_and_the_next_episode_plays() -> None:
    config = OpenEnvConfig(runtime="local")
    env = OpenEnv(config, echo_extras())
    await env.init_async(PROMPT)
    [(_, server)] = shared_pool(config).servers()
    assert isinstance(server, ServerProcess)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(EnvFailure, match="echo_env"):
        await env.step_async("<action>red lamp tree</action>")
    await env.close_async()
    retry = OpenEnv(config, echo_extras())
    await retry.init_async(PROMPT)
    assert (await retry.step_async("<action>red lamp tree</action>"))["reward"] == 1.0
    assert shared_pool(config).num_restarts == 1
    before = num_server_restarts()
    await retry.close_async()
    await close_shared_pools()
    assert num_server_restarts() == before >= 1


async def test_an_unreachable_server_is_an_env_failure() -> None:
    env = OpenEnv(OpenEnvConfig(url="http://127.0.0.1:9"), echo_extras())
    with pytest.raises(EnvFailure, match=r"no server answers at .*refused"):
        await env.init_async(PROMPT)
    with pytest.raises(RuntimeError, match="without a session"):
        await env.step_async("<action>x</action>")
    await env.close_async()
    await close_shared_pools()


async def test_many_episodes_share_one_server(echo_url: str) -> None:
    async def episode(n: int) -> float:
        env = OpenEnv(OpenEnvConfig(url=echo_url, max_sessions=8), echo_extras())
        await env.init_async(PROMPT)
        await asyncio.sleep(0.01 * (n % 3))
        output = await env.step_async("<action>red lamp tree</action>")
        await env.close_async()
        return output["reward"]

    assert await asyncio.gather(*(episode(n) for n in range(40))) == [1.0] * 40
    await close_shared_pools()


@pytest.fixture
def registered() -> Iterator[None]:
    register_openenv()
    register_openenv()  # again is fine
    yield
    deregister("openenv")


@pytest.mark.usefixtures("registered")
def test_it_is_registered_as_openenv(echo_url: str) -> None:
    env = skyrl_gym.make("openenv", env_config={"url": echo_url}, extras=echo_extras())
    assert isinstance(env, OpenEnv)
    assert OpenEnv.is_async


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("extras", example_rows(), ids=lambda row: row["data_source"])
def test_it_keeps_the_contract_of_a_text_environment(extras: dict[str, Any], echo_url: str, coding_url: str) -> None:
    url = {"echo_env": echo_url, "coding_env": coding_url}[extras["env_name"]]
    report = check_env("openenv", extras=extras, env_config={"url": url})
    assert report.passed, str(report)


def test_a_row_without_a_ground_truth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward_spec\.ground_truth=None .*\(SkyRL's rows have no solution\)"):
        OpenEnv(None, {"env_name": "echo_env"})


@pytest.mark.parametrize("name", ["echo_env", "coding_env"])
def test_the_methods_without_a_loop_work_too(name: str, echo_url: str, coding_url: str) -> None:
    row = dataset_rows(name, 1, 1, seed=0)[0][0]
    with OpenEnv({"url": {"echo_env": echo_url, "coding_env": coding_url}[name]}, row) as env:
        env.init(row["prompt"])
        assert env.step(env.gold_actions()[0])["reward"] == 1.0  # ty: ignore[not-subscriptable]
    close_background_pools()


pieces = st.one_of(
    st.sampled_from(
        ["<action>", "</action>", "<action", "action>", "```", "```python\n", "print(", ")", "\x00", "\ud800"]
    ),
    st.text(st.characters(), max_size=30),  # control characters and lone surrogates included
    st.sampled_from(["x" * 1_000_000, "<action>" * 100_000, "</action>" * 50_000, "\n" * 1000, "(" * 3000, "9" * 5000]),
)
replies = st.one_of(
    st.lists(pieces, max_size=8).map("".join),
    st.lists(pieces, min_size=1, max_size=4).map(lambda parts: f"<action>{''.join(parts)}</action>"),
)
never = settings(
    max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@pytest.fixture(scope="module", params=["echo_env", "coding_env"])
def endless_env(request: pytest.FixtureRequest, echo_url: str, coding_url: str) -> Any:
    url = {"echo_env": echo_url, "coding_env": coding_url}[request.param]
    # Hypothesis draws words that stand in our sources, so the solution is one that no text of `pieces` can hold.
    row = {"reward_spec": {"method": "rule", "ground_truth": "no such reply " * 10}, "max_turns": 10**9}
    env = OpenEnv({"url": url}, {**row, "env_name": request.param})
    env.init(PROMPT)
    yield env
    env.close()
    close_background_pools()


@never
@given(reply=replies)
def test_no_reply_raises_out_of_step(endless_env: OpenEnv, reply: str) -> None:
    output = endless_env.step(reply)
    assert 0.0 <= output["reward"] <= 1.0
    assert all(message["content"].encode() and len(message["content"]) < 20_000 for message in output["observations"])
