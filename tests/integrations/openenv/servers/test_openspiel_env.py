from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import integrations.openenv.servers  # noqa: F401  (keeps gradio out when a test imports openenv)
from integrations.openenv.catalog import InvalidAction, catalog_entry
from integrations.openenv.catalog.games import GAMES, OpenSpielObservation, game_of
from integrations.openenv.catalog.games.twenty_forty_eight import _moved
from integrations.openenv.catalog.openspiel import OpenSpielAction, OpenSpielOptions, OpenSpielTranslator
from integrations.openenv.catalog.options import options_from_words
from integrations.openenv.client.errors import OpenEnvError, ServerError
from integrations.openenv.client.session import OpenEnvClient, StepResult, open_session
from integrations.openenv.clients import OpenSpielEnv
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv, close_background_pools, register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.check import check_env
from skyrl_gym.envs.registration import deregister
from tests.integrations.openenv.conftest import started

pytest.importorskip("pyspiel")

SERVER = "integrations.openenv.servers.openspiel_env"
OFFICIAL = {"info_state", "legal_actions", "game_phase", "current_player_id", "opponent_last_action"}
ENTRY = catalog_entry("openspiel_env")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from started(SERVER)


async def random_game(url: str, seed: int, **options: Any) -> list[tuple[Any, ...]]:
    """Everything that a game of random legal moves shows."""
    client, result = await open_session(url, {"seed": seed, **options})
    random, shown = Random(7), [(result.observation, result.reward, result.done)]
    while not result.done and len(shown) < 60:
        result = await client.step({"action_id": random.choice(result.observation["legal_actions"])})
        shown.append((result.observation, result.reward, result.done))
    await client.close()
    return shown


async def play(url: str, options: dict[str, Any], *, seed: int = 0, max_turns: int = 30) -> tuple[OpenEnv, float]:
    """An episode of gold actions: the environment afterwards, and what it paid."""
    row = dataset_rows("openspiel_env", 1, 1, seed=seed, options=options)[0][0]
    env = OpenEnv(OpenEnvConfig(url=url), {**row, "max_turns": max_turns})
    await env.init_async(row["prompt"])
    earned, done = 0.0, False
    while not done:
        output = await env.step_async(env.gold_action() or "<action>none</action>")
        earned, done = earned + output["reward"], output["done"]
    await env.close_async()
    return env, earned


def catch_observation(ball_row: int, ball: int, paddle: int, rows: int = 10, columns: int = 5) -> dict[str, Any]:
    info_state = [0.0] * (rows * columns)
    info_state[ball_row * columns + ball] = info_state[(rows - 1) * columns + paddle] = 1.0
    return {"info_state": info_state, "legal_actions": [0, 1, 2], "game_phase": "playing", "current_player_id": 0}


def translator(first: dict[str, Any] | None = None, **options: Any) -> OpenSpielTranslator:
    made = OpenSpielTranslator(ENTRY.read_options(options))
    made.first_text(StepResult(catch_observation(0, 4, 2) if first is None else first, None, False))
    return made


# The server


@pytest.mark.parametrize(
    "options",
    [{"game": name} for name in GAMES] + [{"game": "tic_tac_toe", "agent_player": 1}, {"game": "negotiation"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
async def test_the_same_seed_and_moves_show_the_same_game_on_every_server(url: str, options: dict[str, Any]) -> None:
    first = await random_game(url, 11, **options)
    assert first == await random_game(url, 11, **options)
    if options["game"] not in ("cliff_walking",):  # which has no chance
        others = [await random_game(url, seed, **options) for seed in range(5)]
        assert any(first != other for other in others)


async def test_a_second_server_process_repeats_the_first(url: str) -> None:
    server = await ServerProcess.start(SERVER, max_sessions=2, timeout_s=90.0)
    try:
        for game in ("catch", "tic_tac_toe", "2048", "blackjack"):
            assert await random_game(url, 5, game=game) == await random_game(server.url, 5, game=game)
    finally:
        server.stop()


async def test_the_official_fields_are_on_the_wire_with_their_types(url: str) -> None:
    client, first = await open_session(url, {"seed": 3})
    assert set(first.observation) >= OFFICIAL
    assert (first.reward, first.done, first.observation["game_phase"]) == (None, False, "initial")
    assert len(first.observation["info_state"]) == 50
    assert all(isinstance(value, float) for value in first.observation["info_state"])
    second = await client.step({"action_id": 1, "game_name": "chess", "game_params": {"rows": 3}})  # has no effect
    assert (second.observation["game_phase"], second.observation["current_player_id"], second.reward) == (
        "playing",
        0,
        0.0,
    )
    state = await client.state()
    expected = {"game_name": "catch", "agent_player": 0, "opponent_policy": "random", "game_params": {}}
    assert state == {"episode_id": state["episode_id"], "step_count": 1, "num_players": 1, **expected}
    await client.close()


async def test_the_official_client_plays(url: str) -> None:
    from openenv.core import GenericEnvClient

    async with GenericEnvClient(base_url=url) as client:
        await client.reset()
        for _ in range(9):
            result = await client.step({"action_id": 1})
        assert (result.done, result.reward in (1.0, -1.0)) == (True, True)


async def test_the_typed_client_plays(url: str) -> None:
    async with await OpenSpielEnv.from_url(url) as env:
        first = await env.reset(seed=3, game="tic_tac_toe", opponent="first")
        assert first.observation.legal_actions == tuple(range(9))
        assert (await env.step(OpenSpielAction(4))).observation.opponent_last_action == 0


async def test_the_environment_variables_of_the_official_image_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from integrations.openenv.servers.openspiel_env import OpenSpielEnvironment

    for name, value in ENTRY.image_variables(OpenSpielOptions("tic_tac_toe", "last", 1)).items():
        monkeypatch.setenv(name, value)
    environment = OpenSpielEnvironment()
    first = environment.reset()
    # The opponent is x, begins, and takes its last legal cell.
    assert (first.opponent_last_action, first.game_phase, first.reward) == (8, "playing", 0.0)
    assert environment.state.step_count == 1
    assert environment.reset(game="catch", agent_player=0).legal_names == ["LEFT", "STAY", "RIGHT"]


async def test_a_step_after_the_end_is_done_again_and_pays_nothing(url: str) -> None:
    client, result = await open_session(url, {"seed": 3})
    for _ in range(9):
        result = await client.step({"action_id": 1})
    assert (result.done, abs(result.reward or 0.0), result.observation["game_phase"]) == (True, 1.0, "terminal")
    again = await client.step({"action_id": 1})
    assert (again.done, again.reward, again.observation) == (True, 0.0, result.observation)
    assert (await client.reset(seed=3)).done is False
    await client.close()


@pytest.mark.parametrize("action", [-1, 3, 10**6])
async def test_an_illegal_move_is_refused_and_the_game_goes_on(url: str, action: int) -> None:
    client, _ = await open_session(url, {"seed": 3})
    with pytest.raises(ServerError, match=rf"action_id={action} is not legal in catch now; legal: \[0, 1, 2\]"):
        await client.step({"action_id": action})
    assert (await client.step({"action_id": 1})).done is False
    await client.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"game": "cath"}, "game='cath' is not a game of OpenSpiel .*; did you mean catch"),
        ({"game": ["catch"]}, "must be the name of a game"),
        ({"game": "matrix_rps"}, "move at the same time"),
        ({"game": "mfg_garnet"}, "only turn-based games"),
        ({"game": "start_at"}, "Missing parameter game"),
        ({"game": "catch", "game_params": {"rows": 0}}, "an observation would have 0 numbers"),
        ({"game": "catch", "game_params": {"rows": 1}}, "over before the first move"),
        ({"game": "catch", "game_params": {"rows": 10**9}}, "numbers; it must have 1 to 100000"),
        (
            {"game": "catch", "game_params": {"row": 3}},
            "Unknown parameter 'row'. Available parameters are: columns, rows",
        ),
        ({"game": "catch", "game_params": {"rows": "x"}}, "Wrong type for parameter rows"),
        ({"opponent": "best"}, "opponent='best' must be one of random, first, last, middle"),
        ({"agent_player": 1}, "agent_player=1, but catch has players 0 to 0"),
        ({"game": "tic_tac_toe", "agent_player": -1}, "agent_player=-1 must be"),
        ({"oponent": "first"}, "reset takes .* not oponent"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_wrong_option_is_refused_by_name_and_the_session_stays(
    url: str, options: dict[str, Any], complaint: str
) -> None:
    client = OpenEnvClient(url)
    await client.connect()
    with pytest.raises(ServerError, match=complaint):
        await client.reset(seed=1, **options)
    with pytest.raises(ServerError, match="step before reset"):
        await client.step({"action_id": 0})
    assert (await client.reset(seed=1)).done is False
    await client.close()


async def test_no_player_is_shown_the_others_cards(url: str) -> None:
    for seed in range(6):  # the engine's own text of the state is "2 1": both cards
        client, first = await open_session(url, {"seed": seed, "game": "kuhn_poker"})
        card = first.observation["info_state"][2:5].index(1.0)
        assert first.observation["text"].startswith(str(card))
        assert len(first.observation["text"]) == 3  # the card, and what each player put in
        await client.close()
    client, first = await open_session(url, {"seed": 0, "game": "blackjack"})
    assert "Dealer: Cards: ??" in first.observation["text"]
    await client.close()


async def test_many_sessions_play_different_games_at_once(url: str) -> None:
    games = [("catch", 1), ("tic_tac_toe", 2), ("2048", 3), ("kuhn_poker", 4)] * 4
    alone = {key: await random_game(url, key[1], game=key[0]) for key in set(games)}
    together = await asyncio.gather(*(random_game(url, seed, game=game) for game, seed in games))
    assert together == [alone[key] for key in games]


# What the model reads and writes


async def test_the_text_of_known_positions(url: str) -> None:
    shown = {}
    for name in GAMES:
        row = dataset_rows("openspiel_env", 1, 1, seed=1, options={"game": name})[0][0]
        env = OpenEnv(OpenEnvConfig(url=url), {**row, "seed": 2, "max_turns": 30})
        messages, _ = await env.init_async(row["prompt"])
        shown[name] = messages[-1]["content"]
        await env.close_async()
    assert shown["tic_tac_toe"] == "A new game.\n\n0 1 2\n3 4 5\n6 7 8"
    assert shown["cliff_walking"] == "A new game.\n\n........\n........\n........\nPXXXXXXG"
    assert shown["kuhn_poker"] in [f"A new game.\n\nYou hold the {card}." for card in ("jack", "queen", "king")]
    assert shown["2048"].count("2") == 2


def test_the_text_of_a_whole_catch_turn() -> None:
    made = translator(catch_observation(0, 4, 2))
    assert made.game.view(made.seen) == "....o\n..x..\nThe ball is to the right."  # ty: ignore[invalid-argument-type]
    assert made.action(" Right. ") == {"action_id": 2, "game_name": "catch", "game_params": {}}
    answer = made.answer(StepResult(catch_observation(1, 4, 3), 0.0, False), last_turn=False)
    assert (answer.text, answer.ended) == ("....o\n...x.\nThe ball is to the right.", False)
    caught = {**catch_observation(9, 4, 4), "legal_actions": [], "game_phase": "terminal"}
    answer = made.answer(StepResult(caught, 1.0, True), last_turn=False)
    assert (answer.text, answer.ended, made.success) == ("You caught the ball.", True, True)


def test_texts_of_the_other_games() -> None:
    ttt = game_of("tic_tac_toe", {}, 1)
    planes = [1.0] * 9 + [0.0] * 18
    for cell, plane in ((0, 1), (4, 2)):  # o at 0, x at 4
        planes[cell], planes[9 * plane + cell] = 0.0, 1.0
    assert ttt.view(OpenSpielObservation(tuple(planes), (1, 2))) == "o 1 2\n3 x 5\n6 7 8"
    kuhn = game_of("kuhn_poker", {}, 0)
    hand = OpenSpielObservation((1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (0, 1))
    assert kuhn.view(hand) == "You hold the king. You passed. The opponent bet."
    assert list(kuhn.names(hand)) == ["pass", "bet", "fold", "call"]
    cards = [0.0] * 189
    cards[85 + 0] = cards[85 + 5] = cards[137 + 25] = 1.0  # ace and 6 of clubs; the dealer's king of diamonds
    jack = game_of("blackjack", {}, 0)
    seen = OpenSpielObservation(tuple(cards), (0, 1))
    assert jack.view(seen) == "Your cards: ace, 6; total 17. The dealer shows: king."
    assert jack.gold(seen) == 0  # a soft 17 is hit
    tiles = (2.0, 2.0, 4.0, 0.0, *[0.0] * 12)
    board = game_of("2048", {}, 0).view(OpenSpielObservation(tiles, (1, 2, 3)))
    assert board == "2 2 4 0\n0 0 0 0\n0 0 0 0\n0 0 0 0\nOnly right, down or left can be played."
    other = game_of("connect_four", {}, 0)
    named = OpenSpielObservation((0.0, 1.0), (0, 3), text="..\nx.\n", legal_names=("x0", "x3"))
    assert other.view(named) == "..\nx.\nLegal moves: x0 or x3."
    assert other.view(OpenSpielObservation((0.0, 1.0), (0, 3))) == "Position: 1=1\nLegal moves: 0 or 3."


def test_the_engine_and_the_catalog_agree_on_2048(url: str) -> None:
    async def boards() -> list[tuple[Any, ...]]:
        client, result = await open_session(url, {"seed": 9, "game": "2048"})
        random, seen = Random(1), []
        for _ in range(50):
            before, move = result.observation["info_state"], random.choice(result.observation["legal_actions"])
            result = await client.step({"action_id": move})
            seen.append(
                (tuple(map(int, before)), move, result.reward, tuple(map(int, result.observation["info_state"])))
            )
        await client.close()
        return seen

    for before, move, reward, after in asyncio.run(boards()):
        slid, paid = _moved(before, move)
        assert paid == reward
        added = [cell for cell in range(16) if slid[cell] != after[cell]]  # chance's tile
        assert len(added) == 1
        assert (slid[added[0]], after[added[0]] in (2, 4)) == (0, True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Your action is empty. Write left, stay or right between <action> and </action>."),
        ("up", "That is not a legal move now. Write left, stay or right between <action> and </action>."),
        ("3", "not a legal move"),
        ("٣", "not a legal move"),
        ("9" * 5000, "not a legal move"),
    ],
    ids=["empty", "up", "3", "arabic", "long"],
)
def test_what_is_no_move_is_answered_with_the_legal_ones(text: str, complaint: str) -> None:
    with pytest.raises(InvalidAction, match=complaint):
        translator().action(text)


@pytest.mark.parametrize("text", ["left", " LEFT ", "\nLeft\n", "'left'", "left.", "0", " 0 "])
def test_moves_are_read_by_word_or_number(text: str) -> None:
    assert translator().action(text)["action_id"] == 0


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.text(max_size=50), st.sampled_from(["x" * 10**6, " " * 10**6, "\x00", "\ud800", "1e5", "-0"])))
def test_any_text_is_a_move_or_no_move(text: str) -> None:
    made, action = translator(), None
    try:
        action = made.action(text)["action_id"]
    except InvalidAction:
        return
    assert action in (0, 1, 2)


# Rewards


@pytest.mark.parametrize(
    ("options", "promise"),
    [
        ({}, 2.0),
        ({"shaped_reward": False}, 1.0),
        ({"game_params": {"rows": 6, "columns": 9}}, 2.0),
        ({"game": "tic_tac_toe"}, 0.0),
        ({"game": "tic_tac_toe", "agent_player": 1, "opponent": "middle"}, 0.0),
        ({"game": "cliff_walking", "shaped_reward": False}, -9.0),
        ({"game": "cliff_walking", "game_params": {"width": 5, "height": 3}}, 1.0 - 0.06),
    ],
    ids=str,
)
async def test_good_moves_earn_what_is_promised(url: str, options: dict[str, Any], promise: float) -> None:
    for seed in range(8):
        env, earned = await play(url, options, seed=seed)
        assert env.translator.gold_reward == pytest.approx(promise)
        assert earned >= promise - 1e-6
        assert env.translator.success or (options.get("game") == "tic_tac_toe" and earned == 0.0)
    await close_shared_pools()


@pytest.mark.parametrize(("game", "at_least"), [("kuhn_poker", -0.2), ("blackjack", -0.4), ("2048", 100.0)])
async def test_good_moves_are_better_than_chance_where_nothing_is_promised(
    url: str, game: str, at_least: float
) -> None:
    played = [await play(url, {"game": game}, seed=seed) for seed in range(25)]
    assert played[0][0].translator.gold_reward is None
    assert sum(earned for _, earned in played) / len(played) > at_least
    await close_shared_pools()


async def test_a_catch_that_is_too_wide_promises_nothing() -> None:
    assert translator(catch_observation(0, 0, 4, 3, 9), game_params={"rows": 3, "columns": 9}).gold_reward is None


def test_the_shaped_reward_of_catch_pays_a_ninth_for_each_good_move() -> None:
    made = translator(catch_observation(0, 4, 2), shaped_reward=True)
    rewards = [
        made.answer(StepResult(catch_observation(row, 4, paddle), 0.0, False), last_turn=False).reward
        for row, paddle in ((1, 3), (2, 2), (3, 2), (4, 3), (5, 4), (6, 4))
    ]  # towards, away, waiting, towards, under it, staying
    assert rewards == pytest.approx([1 / 9, 0, 0, 1 / 9, 1 / 9, 1 / 9])
    missed = made.answer(StepResult(catch_observation(9, 4, 3), -1.0, True), last_turn=False)
    assert missed.reward == -1.0


@pytest.mark.parametrize(("row", "reward"), [(0, -2.0), (3, -1 - 6 / 9), (8, -1 - 1 / 9)])
def test_a_catch_that_is_left_costs_the_ball_and_a_ninth_for_each_move_left(row: int, reward: float) -> None:
    made = translator(catch_observation(0, 4, 2), shaped_reward=True)
    if row:
        made.answer(StepResult(catch_observation(row, 4, 2), 0.0, False), last_turn=False)
    assert made.unfinished_reward() == pytest.approx(reward)
    assert translator(catch_observation(0, 4, 2), shaped_reward=False).unfinished_reward() == -1.0


@pytest.mark.parametrize(("options", "worst"), [({}, -2.0), ({"game": "cliff_walking"}, -1.0)], ids=["catch", "cliff"])
async def test_to_write_no_moves_never_pays_better_than_the_worst_game(
    url: str, options: dict[str, Any], worst: float
) -> None:
    row = dataset_rows("openspiel_env", 1, 1, seed=0, options=options)[0][0]
    env = OpenEnv(OpenEnvConfig(url=url), {**row, "max_turns": 9})
    await env.init_async(row["prompt"])
    rewards = [(await env.step_async("I wait."))["reward"] for _ in range(9)]
    await env.close_async()
    assert rewards == [0.0] * 8 + [worst]
    assert env.get_metrics()["success"] is False
    await close_shared_pools()


# Options and rows


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gme": "catch"}, "openspiel_env has no option 'gme'; did you mean game?"),
        ({"opponent": "best"}, "opponent='best' must be one of"),
        ({"shaped_reward": True, "game": "2048"}, "2048 has none; catch and cliff_walking have one"),
        ({"agent_player": 2, "game": "tic_tac_toe"}, "tic_tac_toe has 2 player"),
        ({"game_params": {"row": 4}}, "catch has no parameter 'row'; it has rows, columns"),
        ({"game_params": {"rows": 0}}, "rows=0 of catch must be a whole number from 2"),
        ({"game": ""}, "must name a game"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_starts(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ENTRY.read_options(options)


def test_a_game_whose_name_is_a_number_may_be_given_as_one() -> None:
    assert ENTRY.read_options(options_from_words(["game=2048"])).game == "2048"


def test_rows_carry_their_game_so_that_prompt_and_game_agree() -> None:
    train, validation = dataset_rows("openspiel_env", 3, 2, seed=0, options={"game": "tic_tac_toe", "agent_player": 1})
    assert {row["options"] for row in train + validation} == {'{"game": "tic_tac_toe", "agent_player": 1}'}
    assert "tic-tac-toe as o" in train[0]["prompt"][0]["content"]
    assert len({row["seed"] for row in train + validation}) == 5


def test_too_few_turns_for_a_reward_are_refused() -> None:
    row = dataset_rows("openspiel_env", 1, 1, seed=0)[0][0]
    with pytest.raises(ValueError, match="an episode takes 9 turns or more"):
        OpenEnv(None, {**row, "max_turns": 8})


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"info_state": "no", "legal_actions": [0]},
        {"info_state": [0.0] * 50, "legal_actions": [True]},
        {"info_state": [float("nan")] * 50, "legal_actions": [0]},
        {"info_state": [0.0] * 27, "legal_actions": [0]},  # another game's
        {"info_state": [0.0] * 50, "legal_actions": [0]},  # no ball
        {**catch_observation(0, 1, 2), "legal_names": ["LEFT"]},
    ],
    ids=range(7),
)
def test_a_broken_observation_is_the_environments_failure(broken: dict[str, Any]) -> None:
    with pytest.raises(OpenEnvError, match="openspiel_env"):
        translator(broken)


def test_the_action_has_the_official_fields() -> None:
    assert OpenSpielAction(2).fields() == {"action_id": 2, "game_name": "catch", "game_params": {}}


@pytest.mark.parametrize("options", [{}, {"game": "kuhn_poker"}, {"game": "connect_four"}], ids=str)
def test_it_keeps_the_contract_of_a_text_environment(url: str, options: dict[str, Any]) -> None:
    register_openenv()
    row = dataset_rows("openspiel_env", 1, 1, seed=0, options=options)[0][0]
    extras = {key: value for key, value in row.items() if key not in ("prompt", "env_class")}
    report = check_env("openenv", extras={**extras, "max_turns": 9}, env_config={"url": url})
    deregister("openenv")
    close_background_pools()
    assert report.passed, str(report)
