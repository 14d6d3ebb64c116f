"""atari_env on the real emulator: our server, and what the catalog makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("ale_py")

from integrations.openenv.catalog import InvalidAction, Task, catalog_entry
from integrations.openenv.catalog.atari import AtariEntry, AtariObservation, AtariOptions, AtariTranslator
from integrations.openenv.catalog.atari_games import GAMES
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError, ServerError
from integrations.openenv.client.session import OpenEnvClient, StepResult, open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv, close_background_pools, register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from integrations.openenv.servers.atari_env import options_of
from skyrl_gym.check import check_env
from skyrl_gym.envs.registration import deregister

MODULE = "integrations.openenv.servers.atari_env"
ENTRY = AtariEntry()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    started = asyncio.run(ServerProcess.start(MODULE, max_sessions=32, timeout_s=120.0))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.url


async def session(url: str, **options: Any) -> tuple[OpenEnvClient, StepResult]:
    return await open_session(url, options, step_timeout_s=60.0)


async def episode(url: str, num_steps: int, **options: Any) -> list[tuple[Any, float | None, bool]]:
    """Play random actions, always the same ones; return (observation, reward, done) of reset and each step."""
    client, first = await session(url, **options)
    random, seen = Random(0), [(first.observation, first.reward, first.done)]
    for _ in range(num_steps):
        result = await client.step({"action_id": random.choice(first.observation["legal_actions"])})
        seen.append((result.observation, result.reward, result.done))
    await client.close()
    return seen


# The server


async def test_the_wire_is_the_official_one(url: str) -> None:
    client, first = await session(url)
    assert set(first.observation) == {
        "screen", "screen_shape", "legal_actions", "lives", "episode_frame_number", "frame_number",
    }  # fmt: skip
    assert (first.reward, first.done) == (0.0, False)
    assert first.observation["screen_shape"] == [210, 160, 3]  # rgb is the official default
    assert len(first.observation["screen"]) == 210 * 160 * 3
    assert first.observation["legal_actions"] == [0, 1, 2, 3, 4, 5]
    official = {"action_id": 2, "game_name": "pong", "obs_type": "rgb", "full_action_space": False}
    second = await client.step(official)
    frames = second.observation["frame_number"] - first.observation["frame_number"]
    assert (second.reward, second.done, frames) == (0.0, False, 4)
    state = await client.state()
    assert state.pop("episode_id")
    assert state == {
        "step_count": 1, "game_name": "pong", "obs_type": "rgb", "full_action_space": False, "mode": None,
        "difficulty": None, "repeat_action_probability": 0.0, "frameskip": 4,
    }  # fmt: skip
    await client.close()


@pytest.mark.parametrize("game", ["pong", "freeway", "kaboom"])  # kaboom remembers its last episode if it only resets
async def test_the_same_seed_and_actions_repeat_an_episode(game: str, url: str) -> None:
    options = {"game": game, "obs_type": "ram", "repeat_action_probability": 0.25, "random_frames": 40}
    one = await episode(url, 30, seed=5, **options)
    assert await episode(url, 30, seed=5, **options) == one
    assert await episode(url, 30, seed=6, **options) != one
    client, _ = await session(url, seed=1, **options)
    for step in range(20):
        await client.step({"action_id": step % 3})
    again = await client.reset(seed=5, **options)  # in a session that has played already
    assert (again.observation, again.reward, again.done) == one[0]
    await client.close()


async def test_another_server_process_plays_the_same_episode(url: str) -> None:
    options = {"game": "breakout", "obs_type": "ram", "seed": 9, "repeat_action_probability": 0.1}
    other = await ServerProcess.start(MODULE, max_sessions=1, timeout_s=120.0)
    try:
        assert await episode(other.url, 40, **options) == await episode(url, 40, **options)
    finally:
        other.stop()


async def test_the_reward_is_the_sum_over_the_frames_of_an_action(url: str) -> None:
    options = {"game": "freeway", "obs_type": "ram", "seed": 1, "noops": 0}
    slow, _ = await session(url, frameskip=1, **options)
    fast, _ = await session(url, frameskip=50, **options)
    for _ in range(5):
        singles = [await slow.step({"action_id": 1}) for _ in range(50)]
        at_once = await fast.step({"action_id": 1})
        assert at_once.reward == sum(result.reward or 0 for result in singles)
        assert at_once.observation == singles[-1].observation
    await slow.close()
    await fast.close()


async def test_after_the_end_nothing_moves(url: str) -> None:
    client, _ = await session(url, seed=3, max_steps=2, obs_type="ram")
    assert [(await client.step({"action_id": 3})).done for _ in range(2)] == [False, True]
    last = await client.step({"action_id": 3})
    after = await client.step({"action_id": 2})
    assert (after.observation, after.reward, after.done) == (last.observation, 0.0, True)
    assert not (await client.reset(seed=3, max_steps=2)).done
    await client.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"game": "pnog"}, "game='pnog' is not known; did you mean pong?"),
        ({"game": "combat"}, "game='combat' is not known"),
        ({"frameskip": 0}, "frameskip=0 must be from 1 to 1000"),
        ({"repeat_action_probability": 1}, "repeat_action_probability=1.0 must be in"),
        ({"obs_type": "pixels"}, "obs_type: Input should be 'rgb', 'grayscale' or 'ram'"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"mode": 77}, "mode=77 is not one of pong's: 0, 1"),
        ({"difficulty": 9}, "difficulty=9 is not one of pong's: 0, 1, 2, 3"),
        ({"frames": 4}, "atari_env has no option 'frames'"),
    ],
)
async def test_wrong_options_are_refused_and_the_session_goes_on(
    options: dict[str, Any], complaint: str, url: str
) -> None:
    client, _ = await session(url, obs_type="ram")
    with pytest.raises(ServerError) as refused:
        await client.reset(**options)
    assert complaint in str(refused.value)
    assert (await client.reset(obs_type="ram")).observation["screen_shape"] == [128]
    with pytest.raises(ServerError, match="action_id=6 must be from 0 to 5"):
        await client.step({"action_id": 6})
    await client.close()


async def test_modes_and_difficulties_and_the_full_action_space_are_the_games(url: str) -> None:
    client, first = await session(url, game="freeway", mode=3, difficulty=1, full_action_space=True, obs_type="ram")
    assert first.observation["legal_actions"] == list(range(18))
    plain = await client.reset(game="freeway", obs_type="ram")
    assert plain.observation["legal_actions"] == [0, 1, 2]
    assert plain.observation["screen"] != first.observation["screen"]
    await client.close()


async def test_many_sessions_play_at_once_and_a_dead_emulator_costs_one(server: ServerProcess) -> None:
    before = {process.pid for process in psutil.Process(server.pid).children(recursive=True)}
    sessions = await asyncio.gather(*(session(server.url, seed=n, obs_type="ram") for n in range(8)))
    workers = [worker for worker in psutil.Process(server.pid).children(recursive=True) if worker.pid not in before]
    assert len(workers) == 8
    workers[0].kill()
    results = await asyncio.gather(*(client.step({"action_id": 2}) for client, _ in sessions), return_exceptions=True)
    [lost] = [result for result in results if isinstance(result, BaseException)]
    assert "the emulator of pong died; reset begins with a new one" in str(lost)
    client = sessions[results.index(lost)][0]
    assert not (await client.reset(seed=1, obs_type="ram")).done
    assert (await client.step({"action_id": 2})).observation["screen_shape"] == [128]
    for client, _ in sessions:
        await client.close()


def test_the_official_environment_variables_are_the_defaults() -> None:
    variables = {"ATARI_GAME": "freeway", "ATARI_FRAMESKIP": "7", "ATARI_REPEAT_ACTION_PROB": "0.25", "ATARI_MODE": "3"}
    options = options_of(variables)
    assert (options.game, options.frameskip, options.repeat_action_probability, options.mode) == ("freeway", 7, 0.25, 3)
    assert (options_of({}).obs_type, options_of({}).full_action_space) == ("rgb", False)
    with pytest.raises(ValueError, match=r"ATARI_.*frameskip"):
        options_of({"ATARI_FRAMESKIP": "fast"})


# The catalog


def translator(**options: Any) -> AtariTranslator:
    made = ENTRY.translator(Task([], "pong"), ENTRY.read_options(options))
    assert isinstance(made, AtariTranslator)
    return made


def memory(paddle: int = 105, ball: int = 152) -> dict[str, Any]:
    """Pong's, with paddle and ball at these bytes."""
    screen = [0] * 128
    screen[51], screen[54] = paddle, ball
    return {"screen": screen, "screen_shape": [128], "legal_actions": list(range(6)), "lives": 0}


@pytest.mark.parametrize(
    ("game", "text", "action_id"),
    [
        ("pong", "UP", 2),
        ("pong", " down\n", 3),
        ("pong", "Stay.", 0),
        ("pong", "no-op", 0),
        ("pong", "fire left", 5),
        ("pong", "3", 3),
        ("freeway", "up", 1),
        ("breakout", "shoot", 1),
        ("boxing", "left up", 7),
        ("boxing", "DOWNRIGHTFIRE", 16),
    ],
)
def test_actions_may_be_named_or_numbered(game: str, text: str, action_id: int) -> None:
    fields = translator(game=game).action(text)
    assert fields == {"action_id": action_id, "game_name": game, "obs_type": "ram", "full_action_space": False}


@pytest.mark.parametrize("text", ["", "sideways", "6", "-7", "UPDOWN", "UP DOWN", "٣", "\ud800", "9" * 100])
def test_other_actions_are_answered_with_the_legal_ones(text: str) -> None:
    with pytest.raises(InvalidAction, match=r"Write one of UP, DOWN, STAY\.$"):
        translator().action(text)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    text=st.one_of(st.text(max_size=100), st.lists(st.sampled_from(["up", "fire", "LEFT", "7", " ", "İ"])).map("".join))
)
def test_any_text_is_an_action_or_invalid(text: str) -> None:
    for game in ("pong", "space_invaders"):
        try:
            action_id = translator(game=game).action(text)["action_id"]
        except InvalidAction:
            continue
        assert 0 <= action_id < len(GAMES[game])


def test_a_turn_pays_points_and_nearness() -> None:
    play = translator(max_steps=4)
    assert play.first_text(StepResult(memory(), 0.0, False)) == "The ball is 40 below your paddle."
    assert play.gold_action() == "DOWN"
    level = play.answer(StepResult(memory(paddle=145), 0.0, False), last_turn=False)
    assert (level.text, level.reward, level.ended) == ("The ball is 0 above your paddle.", 0.25, False)
    lost = play.answer(StepResult(memory(ball=0), -1.0, False), last_turn=False)
    assert (lost.text, lost.reward) == ("You lost 1 point. There is no ball.", -1.0)
    plain = translator(max_steps=1, shaped=False)
    plain.first_text(StepResult(memory(), 0.0, False))
    won = plain.answer(StepResult(memory(), 1.0, False), last_turn=True)
    assert (won.reward, won.ended, plain.success) == (1.0, True, True)
    assert plain.metrics() == {"score": 1.0, "lives": 0.0}


def test_freeway_pays_a_crossing_once() -> None:
    play = translator(game="freeway")
    heights = [6, 92, 177, 6, 6]  # the road is 171 rows; a crossing puts the chicken back down
    total = 0.0
    for turn, height in enumerate(heights):
        seen = {**memory(), "screen": [height if at == 14 else 0 for at in range(128)]}
        if turn == 0:
            play.first_text(StepResult(seen, 0.0, False))
        else:
            total += play.answer(StepResult(seen, 1.0 if turn == 3 else 0.0, False), last_turn=False).reward
    assert total == pytest.approx(1.0)


async def test_the_game_goes_on_when_an_action_cannot_be_read(url: str) -> None:
    row = dataset_rows("atari_env", 1, 1, seed=0)[0][0]

    async def told(reply: str) -> tuple[list[str], list[float]]:
        env = OpenEnv(OpenEnvConfig(url=url, step_timeout_s=60), row)
        await env.init_async(row["prompt"])
        outputs = [await env.step_async(reply) for _ in range(12)]
        await env.close_async()
        assert [output["done"] for output in outputs] == [False] * 11 + [True]
        assert not outputs[-1]["truncated"]
        return [output["observations"][0]["content"] for output in outputs], [output["reward"] for output in outputs]

    still, still_rewards = await told("<action>stay</action>")
    silent, silent_rewards = await told("I wonder.")
    await close_shared_pools()
    assert silent_rewards == still_rewards  # not to play is to stay: it never pays better
    complaint = "There is no action in your reply. Write it between <action> and </action>."
    assert silent == [f"{complaint}\n{text}" for text in still]


def test_other_games_and_screens_are_told_too() -> None:
    other = translator(game="space_invaders")
    assert other.first_text(StepResult({**memory(), "lives": 3}, 0.0, False)) == "Score 0. Lives 3."
    moved = other.answer(StepResult({**memory(ball=150), "lives": 3}, 5.0, False), last_turn=False)
    assert moved.text == "You won 5 points. Score 5. Lives 3. 1 bytes changed: 54: 152 to 150"
    assert other.gold_action() is None
    screen = {"screen": [0] * 210 * 160, "screen_shape": [210, 160], "legal_actions": [0], "lives": 0}
    assert translator(obs_type="grayscale").first_text(StepResult(screen, 0.0, False)) == "\n" * 9


@pytest.mark.parametrize(
    "broken",
    [
        {"screen": None}, {"screen": [1, 2]}, {"screen": ["1"] * 128}, {"screen_shape": [129]}, {"screen_shape": "ram"},
        {"screen_shape": []}, {"lives": None}, {"screen": [1.5] * 128},
        {"screen": [0] * 8, "screen_shape": [2, 2, 2, 1]},
    ],
)  # fmt: skip
def test_a_broken_observation_is_the_servers_failure(broken: dict[str, Any]) -> None:
    with pytest.raises(OpenEnvError, match="atari_env: "):
        AtariObservation.from_fields({**memory(), **broken})


def test_rows_say_what_is_unusual_and_the_official_image_gets_it_as_variables() -> None:
    train, validation = dataset_rows("atari_env", 6, 3, seed=0, options={"game": "freeway", "frameskip": 9})
    assert {json.dumps(json.loads(row["options"])) for row in train} == {'{"frameskip": 9, "game": "freeway"}'}
    seeds = [row["seed"] for row in train + validation]
    assert len(set(seeds)) == 9
    assert json.loads(dataset_rows("atari_env", 1, 1, seed=0)[0][0]["options"]) == {}
    options = ENTRY.read_options({"game": "freeway", "mode": 3})
    assert isinstance(options, AtariOptions)
    assert ENTRY.image_variables(options) == {
        "ATARI_GAME": "freeway", "ATARI_OBS_TYPE": "ram", "ATARI_FULL_ACTION_SPACE": "false",
        "ATARI_REPEAT_ACTION_PROB": "0.0", "ATARI_FRAMESKIP": "20", "ATARI_MODE": "3",
    }  # fmt: skip
    assert "shaped" not in ENTRY.reset_kwargs(options)
    assert catalog_entry("atari-env").name == "atari_env"


@pytest.mark.parametrize("game", ["pong", "breakout", "freeway"])
async def test_the_gold_player_earns_what_it_promises(game: str, url: str) -> None:
    rows, _ = dataset_rows("atari_env", 8, 1, seed=1, options={"game": game})
    for row in rows:
        env, total = OpenEnv(OpenEnvConfig(url=url, step_timeout_s=60), row), 0.0
        await env.init_async(row["prompt"])
        while True:
            output = await env.step_async(env.gold_action() or "")
            total += output["reward"]
            if output["done"]:
                break
        await env.close_async()
        assert not output["truncated"]
        assert env.translator.gold_reward is not None
        assert total >= env.translator.gold_reward, row["seed"]
    await close_shared_pools()


async def test_the_prompt_ends_with_the_first_observation(url: str) -> None:
    row = dataset_rows("atari_env", 1, 1, seed=0)[0][0]
    env = OpenEnv(OpenEnvConfig(url=url, step_timeout_s=60), row)
    prompt, _ = await env.init_async(row["prompt"])
    await env.close_async()
    await close_shared_pools()
    assert [message["content"] for message in prompt[:4]] == [
        "You play Pong. Keep your paddle level with the ball. Answer with one of UP, DOWN, STAY between <action> and "
        "</action>.\n\nThe ball is 42 below your paddle.",
        "<action>DOWN</action>",
        "The ball is 35 above your paddle.",
        "<action>UP</action>",
    ]
    assert prompt[4]["content"].startswith("A new game.\n\nThe ball is ")


def test_it_keeps_the_contract_of_a_text_environment(url: str) -> None:
    register_openenv()
    row = dataset_rows("atari_env", 1, 1, seed=0)[0][0]
    report = check_env("openenv", extras=row, env_config={"url": url, "step_timeout_s": 60})
    deregister("openenv")
    close_background_pools()
    assert report.passed, str(report)
    run_in_background(close_shared_pools())
