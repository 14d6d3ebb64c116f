"""Servers that nobody here wrote, unmodified. OPENENV_ENVS_DIR: the folder envs/ of OpenEnv's repository."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet
import pytest

from integrations.openenv import prepare_dummy_dataset
from integrations.openenv.catalog import GenericEntry, catalog_entry
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv, close_background_pools
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.core import EnvFailure
from skyrl_gym.tool_calls import ToolCall, read_tool_calls, written

SLOW_START = OpenEnvConfig(startup_timeout_s=200.0, trust_dataset_code=True)
ENVS_DIR = os.environ.get("OPENENV_ENVS_DIR")


@pytest.fixture(scope="module", autouse=True)
def no_server_left() -> Any:
    yield
    close_background_pools()


def reward_for_brevity(action: dict[str, Any], observation: dict[str, Any], server: float, done: bool) -> float:
    """Return 1 for an echo of one word, else 0; at the end of the episode the server's reward."""
    return float(" " not in observation["echoed_message"]) if not done else server


def reward_of_nothing(action: dict[str, Any], observation: dict[str, Any], server: float, done: bool) -> float:
    return float("nan")


def episode(name: str, *actions: str, **options: Any) -> tuple[list[Any], dict[str, Any], OpenEnv]:
    """Play one episode; return [first messages, output of each step], the metrics, and the environment.

    Episodes of one server share its process.
    """
    [row], _ = dataset_rows(name, 1, 0, 0, options, SLOW_START)
    with OpenEnv(SLOW_START, {**row, "max_turns": 5}) as env:
        messages, _ = env.init(row["prompt"])
        outputs = [env.step(f"<action>{action}</action>") for action in actions]
        return ["\n".join(message["content"] for message in messages), *outputs], env.get_metrics(), env


def test_the_packages_own_template_is_played_from_its_folder(template_folder: Path) -> None:
    (first, hello, longer), metrics, _ = episode(str(template_folder), "hello", "hello there")
    assert first.startswith("You act in the environment MyEnvironment.")
    assert "between <action> and </action>: a text, the message (Message to echo back)" in first
    assert first.endswith("echoed message: My Env environment ready!\nmessage length: 0")
    assert hello["observations"][0]["content"] == "echoed message: hello\nmessage length: 5"
    assert hello["reward"] == pytest.approx(0.5)  # the template pays 0.1 a character
    assert longer["reward"] == pytest.approx(1.1)
    assert metrics["server_reward"] == pytest.approx(1.6)


def test_the_task_and_its_reward_come_from_options(template_folder: Path) -> None:
    path = f"{__name__}:reward_for_brevity"
    (first, one, two), metrics, _ = episode(
        str(template_folder), "hello", "hello there", instruction="Be brief.", reward=path, success=1.0
    )
    assert first.startswith("Be brief.\n\n")
    assert (one["reward"], two["reward"]) == (1.0, 0.0)
    assert metrics["success"] is True


def test_a_reward_that_is_no_number_is_the_functions_fault(template_folder: Path) -> None:
    with pytest.raises(EnvFailure, match=r"reward_of_nothing': reward must be a finite float, not nan"):
        episode(str(template_folder), "hello", reward=f"{__name__}:reward_of_nothing")
    entry = catalog_entry(str(template_folder))
    for path in ("no_such_module:fn", f"{__name__}:missing", "reward"):
        with pytest.raises(ValueError, match=r"must name a function, like my_pkg\.rewards:score"):
            OpenEnv(
                SLOW_START, {"env_name": entry.name, "reward_spec": {"ground_truth": ""}, "options": {"reward": path}}
            )


def test_a_data_set_is_made_of_what_the_server_says(
    template_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prepare", "--output_dir", str(tmp_path), "--env_name", str(template_folder), "--num_train", "4"]
    monkeypatch.setattr("sys.argv", [*words, "--num_validation", "2", "--option", "instruction=Say something long."])
    prepare_dummy_dataset.main()
    train = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    validation = pyarrow.parquet.read_table(tmp_path / "validation.parquet").to_pylist()
    assert {row["env_name"] for row in train} == {str(template_folder)}
    assert len({row["seed"] for row in train + validation}) == 6
    assert train[0]["prompt"][0]["content"].startswith("Say something long.\n\n")
    assert train[0]["options"] == '{"instruction": "Say something long."}'
    env = OpenEnv({"env_names": [str(template_folder)]}, train[0])
    assert env.options.instruction == "Say something long."


def test_actions_are_calls_of_tools_where_the_data_set_says_so(echo_url: str, template_folder: Path) -> None:
    for name, tool, argument, said in (
        (echo_url, "echo_message", "message", "hi"),
        (str(template_folder), "act", "message", "echoed message: hi\nmessage length: 2"),
    ):
        [row], _ = dataset_rows(name, 1, 0, 0, {"tool_calls": True}, SLOW_START)
        assert "<action>" not in str(row["prompt"])
        with OpenEnv(SLOW_START, {**row, "max_turns": 20}) as env:
            messages, _ = env.init(row["prompt"])
            [schema] = [schema["function"] for schema in env.tool_schemas or [] if schema["function"]["name"] == tool]
            assert schema["parameters"]["properties"][argument]["type"] == "string"
            assert "metadata" not in schema["parameters"]["properties"]
            assert messages[1]["tool_calls"][0]["function"]["name"] in str(env.tool_schemas)
            assert messages[2]["content"].startswith("Now a new episode.")
            right = env.step(f"Hm. {written(ToolCall(tool, {argument: 'hi'}))}")
            assert right["observations"] == [{"role": "tool", "content": said}]
            for reply, complaint in (
                ("<action>hi</action>", "no call of a tool"),
                (written(ToolCall("shout", {})), "tool"),
                (written(ToolCall(tool, {argument: 3})), "not of type 'string'"),
                (written(ToolCall(tool, {argument: "?"})).replace("?", "\\ud800"), "no JSON"),
                (written(ToolCall(tool, {argument: "hi"}))[:-12], "does not end"),
                (f'<tool_call>{{"name": "{tool}", "arguments": {{"{argument}": 1e999}}}}</tool_call>', "no JSON"),
                (f'<tool_call>{{"name": "{tool}", "arguments": "hi"}}</tool_call>', "must be a JSON object"),
                (f"<think>{written(ToolCall(tool, {argument: 'hi'}))}", "no call of a tool"),
            ):
                assert complaint in env.step(reply)["observations"][0]["content"]
            assert env.num_invalid_actions == 8
            odd = env.step(written(ToolCall(tool, {argument: "</tool_call>{é}"})))
            assert "</tool_call>{é}" in odd["observations"][0]["content"]
            two = env.step(f"{written(ToolCall(tool, {argument: 'hi'}))}\n{written(ToolCall(tool, {argument: 'ho'}))}")
            assert two["observations"][0]["content"] == (
                f"{said}\n\nOnly the first of your 2 calls was made: call one tool in each reply."
            )
            assert read_tool_calls(env.translator.random_action(Random(0)) or "")


def test_our_own_servers_are_played_by_their_schema_too(echo_url: str, coding_url: str) -> None:
    (first, said, wrong), _, _ = episode(
        echo_url, '{"tool": "echo_message", "arguments": {"message": "hi"}}', '{"tool": "shout", "arguments": {}}'
    )
    assert "- echo_message(message: a text): Echo the message back." in first
    assert said["observations"][0]["content"] == "hi"
    assert wrong["observations"][0]["content"] == '"tool" must be one of echo_message, echo_with_length.'
    (_, printed), _, _ = episode(coding_url, "print(6 * 7)")
    assert "42" in printed["observations"][0]["content"]


async def test_episodes_that_begin_together_ask_the_server_once(echo_url: str) -> None:
    entry = GenericEntry(catalog_entry(echo_url).foreign)  # ty: ignore[missing-attribute]

    class Session:
        url = echo_url
        asked = 0

        async def mcp(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
            Session.asked += 1
            return {"tools": [{"name": "t", "inputSchema": {"type": "object", "properties": {}}}]}

    await asyncio.gather(*(entry.prepare(Session()) for _ in range(50)))
    assert (Session.asked, entry.is_prepared) == (1, True)


async def test_no_server_is_an_env_failure() -> None:
    env = OpenEnv(
        {"url": "http://127.0.0.1:9"}, {"env_name": "http://127.0.0.1:9", "reward_spec": {"ground_truth": ""}}
    )
    with pytest.raises(EnvFailure, match=r"no server answers at http://127\.0\.0\.1:9"):
        await env.init_async([{"role": "user", "content": "Play."}])
    await env.close_async()
    await close_shared_pools()


def test_a_folder_whose_dependencies_are_missing_says_which(tmp_path: Path) -> None:
    folder = tmp_path / "other_env"
    (folder / "server").mkdir(parents=True)
    (folder / "server" / "app.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(Exception, match=r"No module named 'a_package_that_is_not_there'.*uv pip install"):
        episode(str(folder))


@pytest.mark.skipif(ENVS_DIR is None, reason="OPENENV_ENVS_DIR names no folder envs/ of OpenEnv's repository")
@pytest.mark.parametrize(
    ("folder", "kind", "shown"),
    [
        ("grid_world_env", "one of UP, DOWN, LEFT, RIGHT", "message: Welcome to Grid World!"),
        ("maze_env", "a whole number", "Legal actions: 3"),
        ("connect4_env", "a whole number", "board:\n0 0 0 0 0 0 0"),
        ("wildfire_env", "a text", "grid:\n1 1 1"),
        ("repl_env", "a JSON object", "result.stdout:\nREPL environment initialized."),
        ("echo_env", "a call of a tool", "- echo_message(message: a text): Echo back the provided message."),
    ],
)
def test_environments_of_openenvs_repository_are_played(folder: str, kind: str, shown: str) -> None:
    name = str(Path(ENVS_DIR or "") / folder)
    (first,), _, env = episode(name)
    assert isinstance(env.entry, GenericEntry)
    assert env.entry.description.form.kind == kind
    assert shown in first
    form = env.entry.description.form
    random = Random(0)
    legal = env.translator.random_action(random)
    assert legal is not None
    (_, *outputs), metrics, _ = episode(name, legal, form.random_text(random, None))
    assert metrics["turns"] == len(outputs) == 2
    assert outputs[0]["metadata"]["observation"]


@pytest.mark.parametrize("paid", ["float('nan')", "float('-inf')", "1e300"])
def test_a_reward_that_cannot_be_learned_from_is_the_environments_failure(
    template_folder: Path, tmp_path: Path, paid: str
) -> None:
    folder = shutil.copytree(template_folder, tmp_path / "my_env")
    server = folder / "server" / "my_env_environment.py"
    text = server.read_text()
    assert "reward = length * 0.1" in text
    server.write_text(text.replace("reward = length * 0.1", f"reward = {paid} if 'x' in message else length * 0.1"))
    (_, hello), _, _ = episode(str(folder), "hello")
    assert hello["reward"] == pytest.approx(0.5)
    with pytest.raises(EnvFailure, match="reward must "):
        episode(str(folder), "x")


def test_turns_that_a_server_pays_null_are_counted(echo_url: str) -> None:
    _, metrics, _ = episode(echo_url, '{"tool": "echo_message", "arguments": {"message": "hi"}}')
    assert (metrics["unpaid_turns"], metrics["server_reward"]) == (1, 0.0)
