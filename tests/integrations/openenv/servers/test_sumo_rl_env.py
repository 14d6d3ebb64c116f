"""sumo_rl_env on the real SUMO, through real server processes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sumolib")
pytest.importorskip("libsumo")

from integrations.openenv.catalog import InvalidAction, Task
from integrations.openenv.catalog.sumo_rl import SumoEntry, SumoObservation, SumoOptions, SumoTranslator
from integrations.openenv.client.addresses import fetch_json
from integrations.openenv.client.errors import OpenEnvError, ServerError
from integrations.openenv.client.session import OpenEnvClient, StepResult
from integrations.openenv.env import OpenEnv, close_background_pools, register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from integrations.openenv.servers.sumo_junction import phase_names
from integrations.openenv.servers.sumo_rl_env import WORKER_MODULE, SumoAction, SumoRlEnvironment
from integrations.openenv.servers.sumo_settings import read_settings
from skyrl_gym.check import check_env
from skyrl_gym.envs.registration import deregister
from skyrl_gym.walls.nursery import Nursery

MODULE = "integrations.openenv.servers.sumo_rl_env"
ENTRY = SumoEntry()
SHORT = {"num_seconds": 40, "delta_time": 10, "warmup_seconds": 30, "shuffle_flows": True}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = asyncio.run(ServerProcess.start(MODULE, max_sessions=16, timeout_s=120.0))
    yield server
    server.stop()


@asynccontextmanager
async def session(server: ServerProcess, **options: Any) -> AsyncGenerator[tuple[OpenEnvClient, StepResult]]:
    async with OpenEnvClient(server.url, step_timeout_s=120.0) as client:
        yield client, await client.reset(**options)


async def episode(server: ServerProcess, *phases: int, **options: Any) -> list[StepResult]:
    async with session(server, **options) as (client, first):
        return [first, *[await client.step({"phase_id": phase}) for phase in phases]]


def first_result(*numbers: float, num_phases: int = 2, **more: Any) -> StepResult:
    observation = {"observation": list(numbers), "action_mask": list(range(num_phases)), "sim_time": 45.0, **more}
    return StepResult(observation, None, False, {})


def translator_after(first: StepResult, **options: Any) -> tuple[SumoTranslator, str]:
    translator = SumoTranslator(SumoOptions(**options))
    return translator, translator.first_text(first)


NORTH_IS_GREEN = (1, 0, 1, 0.5, 0.5, 0.5, 0.5, 0.0, 0.1, 0.2, 0.3)  # of lanes with room for 19.8 and 18.9 vehicles


# The server


async def test_the_wire_is_the_official_one(server: ServerProcess) -> None:
    schemas = await fetch_json(server.url, "/schema", 30.0)
    action = schemas["action"]["properties"]
    assert {"phase_id", "ts_id"} <= set(action)
    assert action["ts_id"]["default"] == "0"
    assert {"observation", "observation_shape", "action_mask", "sim_time"} <= set(schemas["observation"]["properties"])
    async with session(server) as (client, first):
        assert set(first.observation) >= {"observation", "observation_shape", "action_mask", "sim_time"}
        assert first.observation["observation"] == [1, 0, 0] + [0] * 8
        assert (first.observation["observation_shape"], first.observation["action_mask"]) == ([11], [0, 1])
        assert (first.reward, first.done) == (None, False)
        step = await client.step({"phase_id": 1, "ts_id": "t"})
        assert (step.observation["sim_time"], step.done) == (5.0, False)
        state = await client.state()
        official = {"num_seconds": 20000, "delta_time": 5, "yellow_time": 2, "min_green": 5, "max_green": 50}
        assert official.items() <= state.items()
        assert (state["reward_fn"], state["sim_time"], state["step_count"]) == ("diff-waiting-time", 5.0, 1)
        assert state["total_vehicles"] > 0
        assert {"net_file", "route_file", "total_waiting_time", "mean_waiting_time", "mean_speed"} <= set(state)


def test_the_metadata_are_plain_json() -> None:
    nursery = Nursery(WORKER_MODULE)
    environment = SumoRlEnvironment(nursery)
    environment.reset(seed=1)
    metadata = environment.step(SumoAction(phase_id=0)).metadata
    assert metadata["num_green_phases"] == 2
    assert set(metadata["system_info"]) == {
        "system_total_stopped",
        "system_total_waiting_time",
        "system_mean_waiting_time",
        "system_mean_speed",
    }
    json.dumps(metadata, allow_nan=False)
    environment.close()
    nursery.close()


async def test_the_environment_variables_of_the_official_image_are_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUMO_DELTA_TIME", "7")
    monkeypatch.setenv("SUMO_NET_FILE", "cologne1")
    assert (read_settings({}).delta_time, read_settings({}).first_second) == (7, 25200)
    assert read_settings({"delta_time": 9}).delta_time == 9
    monkeypatch.setenv("SUMO_DELTA_TIME", "1")
    with pytest.raises(ValueError, match="delta_time=1 must be 3 to"):
        read_settings({})


async def test_a_seed_makes_the_traffic_and_repeats_it_in_another_process_too(server: ServerProcess) -> None:
    phases = [1, 0, 0, 1]
    once = await episode(server, *phases, seed=7, **SHORT)
    assert once == await episode(server, *phases, seed=7, **SHORT)
    assert once != await episode(server, *phases, seed=8, **SHORT)
    other = await ServerProcess.start(MODULE, max_sessions=1, timeout_s=120.0)
    try:
        assert once == await episode(other, *phases, seed=7, **SHORT)
    finally:
        other.stop()


async def test_a_reset_in_the_middle_starts_the_same_episode_again(server: ServerProcess) -> None:
    async with session(server, seed=3, **SHORT) as (client, first):
        step = await client.step({"phase_id": 1})
        assert await client.reset(seed=3, **SHORT) == first
        assert await client.step({"phase_id": 1}) == step


async def test_the_episode_ends_with_the_agents_seconds_and_a_step_after_it_pays_nothing(server: ServerProcess) -> None:
    *_, third, last, after = await episode(server, 0, 1, 0, 1, 0, seed=1, **SHORT)
    assert (third.done, last.done, after.done) == (False, True, True)
    assert last.observation["sim_time"] == 30 + 40  # the warm-up is not the agent's
    assert after.reward == 0.0
    assert after.observation == last.observation


async def test_the_official_reward_is_how_much_less_the_vehicles_have_waited(server: ServerProcess) -> None:
    results = await episode(server, 0, 0, 0, seed=1, reward_fn="queue", **SHORT)
    for result in results[1:]:
        seen = SumoObservation.from_fields(result.observation)
        room = [148.55 / 7.5] * 2 + [141.95 / 7.5] * 2
        assert result.reward == pytest.approx(-sum(q * r for q, r in zip(seen.queues, room, strict=True)), abs=1e-4)
    waiting = await episode(server, 0, 0, 0, seed=1, **SHORT)
    assert all(result.reward is not None and result.reward < 0 for result in waiting[2:])  # nobody from the west passes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "atlantis"}, "network='atlantis' is neither a file nor a bundled network: 2way-single"),
        ({"route_file": "none.rou.xml"}, "none of the network's own: single-intersection.rou.xml"),
        ({"delta_time": 2}, "delta_time=2 must be 3 to 1000000"),
        ({"delta_time": "soon"}, "delta_time: Input should be a valid integer"),
        ({"reward_fn": "happiness"}, "reward_fn='happiness' must be one of diff-waiting-time, average-speed"),
        ({"delta_tim": 5}, "no option 'delta_tim'; did you mean delta_time"),
        ({"seed": -1}, "seed=-1 must be 0 to"),
        ({"traffic_light": "x"}, "traffic_light='x' is none of the network's: t"),
    ],
)
async def test_a_wrong_option_is_named_and_the_session_goes_on(
    server: ServerProcess, options: dict[str, Any], message: str
) -> None:
    async with OpenEnvClient(server.url, step_timeout_s=120.0) as client:
        with pytest.raises(ServerError) as refused:
            await client.reset(**options)
        assert message in str(refused.value)
        with pytest.raises(ServerError, match="reset comes first"):
            await client.step({"phase_id": 0})
        await client.reset(seed=1)
        with pytest.raises(ServerError, match="phase_id=2 must be 0 to 1"):
            await client.step({"phase_id": 2})
        assert (await client.step({"phase_id": 1})).reward is not None


async def test_a_broken_route_file_is_the_users_to_see(server: ServerProcess, tmp_path: Any) -> None:
    broken = tmp_path / "broken.rou.xml"
    broken.write_text('<routes><flow id="a" route="nowhere" begin="0" end="9" probability="0.5"/></routes>')
    async with OpenEnvClient(server.url, step_timeout_s=120.0) as client:
        with pytest.raises(ServerError, match="The route 'nowhere' for flow 'a' is not known"):
            await client.reset(route_file=str(broken))


@pytest.mark.parametrize(
    ("network", "phases"),
    [
        ("2way-single-intersection", ["north-south", "north-south left", "east-west", "east-west left"]),
        ("ingolstadt1", ["north-south-west", "south", "north-west"]),
        ("2x2grid", ["north-south", "north-south left", "east-west", "east-west left"]),
    ],
)
async def test_other_networks_are_named_by_their_geometry(
    server: ServerProcess, network: str, phases: list[str]
) -> None:
    first, *_, last = await episode(server, 1, 1, network=network, num_seconds=20, delta_time=10, seed=1)
    assert first.observation["junction"]["phases"] == phases
    assert last.done
    assert SumoObservation.from_fields(last.observation).phase == 1


def test_phases_of_one_name_are_told_apart() -> None:
    straight, left = (["north", "south"], ["straight", "right"]), (["north", "south"], ["left", "left"])
    assert phase_names([straight, left]) == ["north-south", "north-south left"]
    assert phase_names([straight, straight]) == ["north-south 0", "north-south 1"]
    assert phase_names([(["west", "east", "south", "north"], ["left"]), ([], [])]) == ["all sides", "nobody"]


async def test_many_sessions_run_at_once_and_a_killed_worker_costs_one(server: ServerProcess) -> None:
    single = await episode(server, 1, 0, seed=100, **SHORT)
    clients = [OpenEnvClient(server.url, step_timeout_s=120.0) for _ in range(12)]
    for client in clients:
        await client.connect()
    try:
        firsts = await asyncio.gather(*(client.reset(seed=100 + n, **SHORT) for n, client in enumerate(clients)))
        assert firsts[0] == single[0]
        nursery = next(child for child in psutil.Process(server.pid).children() if child.children())
        assert nursery.num_threads() == 1  # a fork of a process with threads can hang
        while len(workers := sorted(nursery.children(), key=lambda worker: worker.pid)) > 12:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert len(workers) == 12
        workers[5].kill()
        steps = await asyncio.gather(*(client.step({"phase_id": 1}) for client in clients), return_exceptions=True)
        [lost] = [n for n, step in enumerate(steps) if isinstance(step, BaseException)]
        assert "the simulation crashed" in str(steps[lost])
        assert lost == 0 or steps[0] == single[1]
        assert await clients[lost].reset(seed=100 + lost, **SHORT) == firsts[lost]
    finally:
        for client in clients:
            await client.close()


# What the model reads and says


def test_the_queues_are_told_by_approach_the_longest_first() -> None:
    translator, text = translator_after(first_result(*NORTH_IS_GREEN))  # the official image's own network
    assert text == "Green: north. Waiting: west 9, north 2."
    assert translator.gold_action() == "west"
    junction = {"phases": ["north-south", "east-west"], "phase_lanes": [[0, 2], [1, 3]], "lane_room": [20.0] * 4}
    early = (0, 1, 0, *NORTH_IS_GREEN[3:])
    assert translator_after(first_result(*early, junction=junction))[1] == (
        "Green: east-west (cannot change yet). Waiting: east-west 8, north-south 4."
    )


def test_a_light_that_nothing_is_known_about_is_told_in_numbers() -> None:
    first = first_result(0, 0, 1, 1, 0.3, 0.3, 0.123, 0.0, num_phases=3)
    translator, text = translator_after(first)
    assert text == "Green: phase 2. Waiting by lane, in % of its room: 12%, 0%."
    assert translator.gold_action() is None
    assert translator.action("Phase 1") == {"phase_id": 1, "ts_id": "0"}


def test_an_action_is_a_name_or_a_number_in_any_spelling() -> None:
    junction = {"phases": ["north-south", "east-west left"], "phase_lanes": [[0, 2], [1, 3]], "lane_room": [20.0] * 4}
    translator, _ = translator_after(first_result(*NORTH_IS_GREEN, junction=junction))
    for text in ("east-west left", " East West\nLEFT. ", "1", "phase 1"):
        assert translator.action(text) == {"phase_id": 1, "ts_id": "0"}
    with pytest.raises(InvalidAction) as refused:
        translator.action("east")
    assert str(refused.value) == "There is no 'east' here. Write one of: north-south, east-west left."


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.text(), st.sampled_from(["9" * 5000, "-1", "1.0", "²", "٣", "north\x00", "NaN", "x" * 10**6])))
def test_any_text_is_a_phase_or_an_invalid_action(text: str) -> None:
    translator, _ = translator_after(first_result(*NORTH_IS_GREEN))
    try:
        said = str(translator.action(text)["phase_id"])
    except InvalidAction as invalid:
        said = str(invalid)
    assert said in ("0", "1") or (said.startswith("There is no") and len(said) < 300)


@pytest.mark.parametrize(
    "wrong",
    [
        {"observation": None},
        {"observation": [1, 0, 1, "a"]},
        {"observation": [1, 0, 1, math.nan, 0]},
        {"observation": [1, 1, 1, 0, 0]},
        {"observation": [1, 0, 1, 0, 0, 0]},
        {"action_mask": [1, 2]},
        {"action_mask": []},
        {"sim_time": "noon"},
    ],
)
def test_what_no_such_server_says_is_the_environments_failure(wrong: dict[str, Any]) -> None:
    right = {"observation": [1, 0, 1, 0.0, 0.0], "action_mask": [0, 1], "sim_time": 5.0}
    assert SumoObservation.from_fields(right).num_phases == 2
    with pytest.raises(OpenEnvError, match="sumo_rl_env"):
        SumoObservation.from_fields(right | wrong)


@pytest.mark.parametrize(
    "junction",
    [
        3,
        {},
        {"phases": ["a"], "phase_lanes": [[0]], "lane_room": [1.0] * 4},
        {"phases": ["a", "b"], "phase_lanes": [[0], [9]], "lane_room": [1.0] * 4},
        {"phases": ["a", "b"], "phase_lanes": [[0], [[]]], "lane_room": [1.0] * 4},
        {"phases": ["a", "b"], "phase_lanes": [[0], [1]], "lane_room": ["x"] * 4},
    ],
)
def test_a_junction_that_does_not_fit_is_the_environments_failure(junction: Any) -> None:
    with pytest.raises(OpenEnvError, match="sumo_rl_env"):
        translator_after(first_result(*NORTH_IS_GREEN, junction=junction))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta_time": 2}, "yellow_time=2 < delta_time=2 <= num_seconds=120 must hold"),
        ({"reward_fn": "speed"}, "reward_fn: Input should be 'diff-waiting-time'"),
        ({"warmup_seconds": -1}, "warmup_seconds=-1 is too little"),
        ({"horizon": 60}, "no option 'horizon'"),
    ],
)
def test_wrong_options_are_refused_before_a_server_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ENTRY.read_options(options)


# Rewards


def test_the_shaped_reward_falls_with_the_room_that_is_taken() -> None:
    translator, _ = translator_after(first_result(*NORTH_IS_GREEN))
    queues = [(0.0, 0.0, 0.0, 0.0), (0.1, 0.1, 0.2, 0.0), (1.0, 1.0, 0.0, 0.0)]  # nothing, 0.1, 0.5 of the room
    results = [first_result(1, 0, 1, 1, 1, 1, 1, *queue) for queue in queues]
    rewards = [
        translator.answer(StepResult(result.observation, -9.0, False, {}), last_turn=False).reward for result in results
    ]
    assert rewards == pytest.approx([1 / 8, 0.7 / 8, 0.0])
    assert translator.metrics()["score"] == pytest.approx(1.7 / 8)
    assert translator.unfinished_reward() == 0.0  # no turn costs anything


def test_not_playing_never_pays_better_than_a_full_junction() -> None:
    translator, _ = translator_after(first_result(*NORTH_IS_GREEN), shaped_reward=False)
    for _ in range(7):
        translator.answer(StepResult(first_result(*NORTH_IS_GREEN).observation, -0.5, False, {}), last_turn=False)
    assert translator.unfinished_reward() == pytest.approx(-(2 * 19.8 + 2 * 18.9) * 0.15)  # one turn of 15 s


async def played(server: ServerProcess, seed: int, player: str, **options: Any) -> tuple[float, OpenEnv]:
    row = dataset_rows("sumo_rl_env", 1, 0, seed=0)[0][0]
    env = OpenEnv({"url": server.url, "options": options, "step_timeout_s": 120.0}, row | {"seed": seed})
    await env.init_async(row["prompt"])
    random, total, done = Random(seed), 0.0, False
    while not done:
        reply = env.gold_action() if player == "gold" else f"<action>{random.randrange(2)}</action>"
        assert reply is not None
        output = await env.step_async(reply)
        total, done = total + output["reward"], output["done"]
    await env.close_async()
    return total, env


@pytest.mark.parametrize("shaped", [True, False])
async def test_longest_queue_first_earns_the_gold_reward_and_beats_chance(server: ServerProcess, shaped: bool) -> None:
    gold = [await played(server, seed, "gold", shaped_reward=shaped) for seed in range(12)]
    chance = [await played(server, seed, "chance", shaped_reward=shaped) for seed in range(12)]
    await close_shared_pools()
    promised = SumoTranslator(SumoOptions(shaped_reward=shaped)).gold_reward
    assert promised is not None
    assert min(total for total, _ in gold) >= promised
    margin = sum(total for total, _ in gold) / 12 - sum(total for total, _ in chance) / 12
    assert margin > (0.2 if shaped else 2.0)
    assert all(env.get_metrics()["turns"] == 8 for _, env in gold)
    assert sum(env.get_metrics()["success"] for _, env in gold) > 6
    if shaped:
        assert all(0.0 <= total <= 1.0 for total, _ in gold + chance)


def test_only_the_default_simulation_promises_a_gold_reward() -> None:
    assert SumoTranslator(SumoOptions(network="cologne1")).gold_reward is None


def test_the_official_image_gets_its_variables_and_our_server_its_options() -> None:
    options = SumoOptions(num_seconds=300, network="/nets/mine.net.xml", route_file="/nets/mine.rou.xml")
    assert dict(ENTRY.source(options).variables) == {
        "SUMO_NET_FILE": "/nets/mine.net.xml",
        "SUMO_ROUTE_FILE": "/nets/mine.rou.xml",
        "SUMO_NUM_SECONDS": "300",
        "SUMO_DELTA_TIME": "15",
        "SUMO_YELLOW_TIME": "2",
        "SUMO_MIN_GREEN": "5",
        "SUMO_REWARD_FN": "diff-waiting-time",
    }
    assert "SUMO_NET_FILE" not in ENTRY.image_variables(SumoOptions())
    assert "shaped_reward" not in ENTRY.reset_kwargs(options)
    assert (ENTRY.fewest_turns(options), ENTRY.fewest_turns(SumoOptions(shaped_reward=False))) == (1, 8)


def test_rows_differ_by_their_seeds() -> None:
    train, validation = dataset_rows("sumo_rl_env", 5, 3, seed=0)
    assert len({row["seed"] for row in train + validation}) == 8
    assert isinstance(ENTRY.tasks(Random(0), 1, SumoOptions())[0], Task)


def test_it_keeps_the_contract_of_a_text_environment(server: ServerProcess) -> None:
    register_openenv()
    try:
        row = dataset_rows("sumo_rl_env", 1, 0, seed=0)[0][0]
        report = check_env("openenv", extras=row, env_config={"url": server.url})
        assert report.passed, str(report)
    finally:
        close_background_pools()
        deregister("openenv")
