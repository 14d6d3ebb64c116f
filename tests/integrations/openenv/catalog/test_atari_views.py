"""The addresses in the console's memory against the pixels of its screen."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

pytest.importorskip("ale_py")

import numpy as np
from ale_py import Action, ALEInterface, LoggerMode, roms

from integrations.openenv.catalog.atari_games import GAMES, GameOptions
from integrations.openenv.catalog.atari_views import VIEWS, breakout, changes, freeway, picture, pong, words_of

WHITE, GREEN, RED, YELLOW = (236, 236, 236), (92, 186, 92), (200, 72, 72), (252, 252, 84)
ALEInterface.setLoggerMode(LoggerMode.Error)


def played(game: str, num_frames: int, hold: int) -> Iterator[tuple[Any, Any]]:
    """Memory and screen of each frame, under random actions."""
    console = ALEInterface()
    console.setInt("random_seed", 1)
    console.setFloat("repeat_action_probability", 0.0)
    console.loadROM(str(roms.get_rom_path(game)))
    random, action = Random(0), Action.NOOP
    for frame in range(num_frames):
        if frame % hold == 0:
            action = random.choice(console.getMinimalActionSet())
        console.act(action)
        if console.game_over():
            console.reset_game()
        yield [int(byte) for byte in console.getRAM()], console.getScreenRGB()


def rows_and_columns(screen: Any, colour: tuple[int, int, int], top: int, bottom: int) -> tuple[Any, Any]:
    """Return the rows and columns of the pixels of this colour between two rows."""
    rows, columns = np.nonzero((screen[top:bottom] == colour).all(-1))
    return rows + top, columns


def memory_with(**bytes_at: int) -> list[int]:
    memory = [0] * 128
    for at, value in bytes_at.items():
        memory[int(at[1:])] = value
    return memory


def test_pong_memory_says_how_far_the_ball_is_from_the_paddle() -> None:
    compared = 0
    for memory, screen in played("pong", 1200, hold=12):
        ball, _ = rows_and_columns(screen, WHITE, 34, 194)
        paddle, _ = rows_and_columns(screen, GREEN, 34, 194)
        if len(ball) == 8 and len(paddle) == 64:  # neither is cut off at the edge
            below = (ball.min() + 2) - (paddle.min() + 8)
            assert pong(memory, None).nearness == pytest.approx(max(1 - abs(below) / 80, 0), abs=1.5 / 80)
            compared += 1
    assert compared > 300


def test_breakout_memory_says_how_far_the_ball_is_from_the_paddle() -> None:
    compared = 0
    for memory, screen in played("breakout", 1500, hold=9):
        rows, ball = rows_and_columns(screen[:, 8:152], RED, 93, 187)
        _, paddle = rows_and_columns(screen[:, 8:152], RED, 190, 193)
        if len(rows) == 8 and len(set(paddle)) == 16 and np.ptp(paddle) == 15:
            right = (ball.min() + 1) - (paddle.min() + 8)
            assert breakout(memory, None).nearness == pytest.approx(max(1 - abs(right) / 80, 0), abs=1.5 / 80)
            compared += 1
    assert compared > 200


def test_freeway_memory_says_how_high_the_chicken_is() -> None:
    compared = 0
    for memory, screen in played("freeway", 1200, hold=40):
        rows, _ = rows_and_columns(screen[:, 44:51], YELLOW, 20, 196)
        if len(rows) and np.ptp(rows) <= 8:  # no car of the same colour
            assert freeway(memory, None).progress * 171 + 6 == pytest.approx(200 - rows.max(), abs=4)  # it shakes
            compared += 1
    assert compared > 30


def test_the_text_of_known_positions() -> None:
    low_ball = memory_with(_54=152, _51=105)
    assert pong(low_ball, None).text == "The ball is 40 below your paddle."
    assert pong(low_ball, None).gold == "DOWN"
    assert pong(memory_with(_54=72, _51=105), None).text == "The ball is 40 above your paddle."
    assert pong(memory_with(_54=0), None).text == "There is no ball."
    assert breakout(memory_with(_101=100, _99=100, _72=61), None).text == "The ball is 30 right of your paddle."
    assert breakout(memory_with(_101=0), None).gold == "FIRE"
    assert freeway(memory_with(_14=92, _113=50), None).text == "You are 50% across. A car is near."
    assert freeway(memory_with(_14=92, _113=100), None).text == "You are 50% across. The road is free."


def test_other_games_are_told_by_what_changed() -> None:
    before = memory_with(_3=7, _90=200)
    assert changes(memory_with(_3=9, _90=100), before) == "2 bytes changed: 3: 7 to 9, 90: 200 to 100"
    assert changes(before, None) == ""


def test_a_screen_is_drawn_in_ten_rows_of_twenty() -> None:
    screen = np.zeros((210, 160), dtype=int)
    screen[100, 85] = 200  # one bright pixel, in field 4 of 10 and 10 of 20
    drawn = picture(screen.ravel().tolist(), [210, 160]).split("\n")
    assert drawn == ["", "", "", "", " " * 10 + "#", "", "", "", "", ""]
    colour = np.stack([screen] * 3, axis=-1)
    assert picture(colour.ravel().tolist(), [210, 160, 3]).split("\n") == drawn
    assert picture([0] * 210 * 160, [210, 160]) == "\n" * 9


def test_the_words_and_the_sets_of_actions_are_the_emulators() -> None:
    assert len(GAMES) == 104
    for game in ("pong", "breakout", "freeway", "skiing", "tetris", "asteroids", "kung_fu_master", "boxing"):
        console = ALEInterface()
        console.loadROM(str(roms.get_rom_path(game)))
        assert GAMES[game] == tuple(action.name for action in console.getMinimalActionSet())
        everything = GameOptions(game=game, full_action_space=True).actions
        assert everything == tuple(action.name for action in console.getLegalActionSet())
        assert set(words_of(game).values()) <= set(GAMES[game])
    two_players = {"combat", "joust", "maze_craze", "warlords"}
    assert set(roms.get_all_rom_ids()) == set(GAMES) | two_players
    for game, view in VIEWS.items():
        assert GameOptions(game=game).actions == GAMES[game]
        assert all(answered in view.words for _, answered in view.examples)
