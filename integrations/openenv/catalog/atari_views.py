"""Descriptions of a running Atari game for a language model.

They are a sentence from the console's memory if its addresses are known, else the bytes that changed in it, or a coarse
picture if a server sends only the screen.

Addresses: Anand et al. 2019, "Unsupervised State Representation Learning in Atari", appendix D. Each was compared here
with the pixels of 600 to 4000 frames (tests/integrations/openenv/catalog/test_atari_views.py does it again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from integrations.openenv.catalog.atari_games import GAMES

Memory = Sequence[int]  # 128 bytes
Example = tuple[str, str]  # the text that is read, the action that is answered
SHOWN_CHANGES = 6
PICTURE_COLUMNS, PICTURE_ROWS, SHADES = 20, 10, " .:*#"


@dataclass(frozen=True, slots=True)
class Sight:
    """The information read from the memory in one turn."""

    text: str
    gold: str  # the word that a good player writes now
    nearness: float | None = None  # of paddle and ball, 1 where they are level; None without a ball
    progress: float = 0.0  # of the way to the next point


@dataclass(frozen=True, slots=True)
class View:
    """The description of one game for the model, and its default options."""

    task: str
    examples: tuple[Example, ...]
    look: Callable[[Memory, Memory | None], Sight]  # the memory now, and a turn before
    words: dict[str, str]  # the actions that are offered, and the emulator's names of them
    frameskip: int  # at which a turn is long enough to matter and short enough to steer
    random_frames: int  # before the episode, so that episodes differ and something is going on
    wanted_score: float  # an episode with default options that reaches it is a success
    gold_reward: float  # of an episode with default options; measured, with a margin


# Pong: the ball is 2 x 4 pixels, a paddle 16 high. Memory counts rows from 13 or 14 above the screen's own.
def pong(memory: Memory, before: Memory | None) -> Sight:
    ball_y, paddle_y = memory[54] - 12, memory[51] - 5
    if memory[54] < 44:  # between a point and the next serve
        return Sight("There is no ball.", "STAY")
    below = ahead = ball_y - paddle_y
    if before is not None and before[54] >= 44:  # both go on moving, the paddle half as far if it is let go
        ahead += (memory[54] - before[54]) - (memory[51] - before[51]) // 2
    return Sight(
        _offset("ball", below, "below", "above"),
        _towards(ahead, 5, "DOWN", "UP"),
        nearness=max(1 - abs(below) / 80, 0.0),
    )


# Breakout: the ball is 2 x 4 pixels, the paddle 16 wide. No ball until FIRE serves one.
def breakout(memory: Memory, before: Memory | None) -> Sight:
    if not 0 < memory[101] < 180:
        return Sight("There is no ball.", "FIRE")
    right = (memory[99] - 48) - (memory[72] - 39)
    drift = memory[99] - before[99] if before is not None and 0 < before[101] < 180 else 0
    return Sight(
        _offset("ball", right, "right of", "left of"),
        _towards(right + drift // 2, 10, "RIGHT", "LEFT"),
        nearness=max(1 - abs(right) / 80, 0.0),
    )


# Freeway: the chicken's height runs from 6 to 177; ten lanes of 16 rows, the lowest from 27 on.
def freeway(memory: Memory, before: Memory | None) -> Sight:
    climbed = memory[14] - 6
    lane = min(max((memory[14] - 6) // 16, 0), 9)  # the next one, counted from below
    car_x = memory[108 + lane] - 3
    road = "A car is near." if 20 <= car_x <= 68 else "The road is free."
    return Sight(f"You are {100 * climbed // 171}% across. {road}", "UP", progress=climbed / 171)


VIEWS: dict[str, View] = {
    "pong": View(
        task="You play Pong. Keep your paddle level with the ball.",
        examples=(
            ("The ball is 42 below your paddle.", "DOWN"),
            ("The ball is 35 above your paddle.", "UP"),
        ),
        look=pong,
        words={"UP": "RIGHT", "DOWN": "LEFT", "STAY": "NOOP"},
        frameskip=6,
        random_frames=175,
        wanted_score=0.0,  # an episode is one ball: not lost
        gold_reward=-0.6,
    ),
    "breakout": View(
        task="You play Breakout. Keep your paddle below the ball. FIRE serves a ball.",
        examples=(
            ("The ball is 42 right of your paddle.", "RIGHT"),
            ("The ball is 35 left of your paddle.", "LEFT"),
        ),
        look=breakout,
        words={"LEFT": "LEFT", "RIGHT": "RIGHT", "STAY": "NOOP", "FIRE": "FIRE"},
        frameskip=14,
        random_frames=20,
        wanted_score=1.0,
        gold_reward=0.3,
    ),
    "freeway": View(
        task="You play Freeway. Bring the chicken up across ten lanes, again and again.",
        examples=(
            ("You are 20% across. A car is near.", "STAY"),
            ("You are 20% across. The road is free.", "UP"),
        ),
        look=freeway,
        words={"UP": "UP", "DOWN": "DOWN", "STAY": "NOOP"},
        frameskip=20,
        random_frames=60,
        wanted_score=1.0,
        gold_reward=-0.2,
    ),
}


def changes(memory: Memory, before: Memory | None) -> str:
    """Return the bytes that changed most since the last turn, as "2 bytes changed: 14: 6 to 22, ...".

    "" in the first turn.
    """
    if before is None:
        return ""
    moved = sorted(
        (-abs(new - old), at) for at, (old, new) in enumerate(zip(before, memory, strict=True)) if new != old
    )
    shown = sorted(at for _, at in moved[:SHOWN_CHANGES])
    return f"{len(moved)} bytes changed: " + ", ".join(f"{at}: {before[at]} to {memory[at]}" for at in shown)


def picture(screen: Sequence[int], shape: Sequence[int]) -> str:
    """Return 10 rows of 20 characters: the brightest pixel of each field, from dark to bright " .:*#"."""
    height, width = shape[0], shape[1]
    channels = shape[2] if len(shape) == 3 else 1
    brightest = max(*screen, 1)
    rows = []
    for row in range(PICTURE_ROWS):
        lines = range(row * height // PICTURE_ROWS, (row + 1) * height // PICTURE_ROWS)
        cells = []
        for column in range(PICTURE_COLUMNS):
            left, right = column * width // PICTURE_COLUMNS, (column + 1) * width // PICTURE_COLUMNS
            top = max(max(screen[(y * width + left) * channels : (y * width + right) * channels]) for y in lines)
            cells.append(SHADES[top * (len(SHADES) - 1) // brightest])
        rows.append("".join(cells).rstrip())
    return "\n".join(rows)


def words_of(game: str) -> dict[str, str]:
    """Return the words of the actions that the model is offered, each with the emulator's name of it."""
    if game in VIEWS:
        return VIEWS[game].words
    return {"STAY" if action == "NOOP" else action: action for action in GAMES[game]}


def _offset(thing: str, by: int, positive: str, negative: str) -> str:
    return f"The {thing} is {abs(by)} {positive if by > 0 else negative} your paddle."


def _towards(by: float, slack: int, positive: str, negative: str) -> str:
    return positive if by > slack else negative if by < -slack else "STAY"
