"""The games of ale-py 0.12, the actions that each takes, and the options that a game is started with."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

ObsType = Literal["rgb", "grayscale", "ram"]

# In the emulator's order. A game's legal actions are a subset in the same order, and `action_id` is the index in it.
ALL_ACTIONS = (
    "NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "UPFIRE", "RIGHTFIRE",
    "LEFTFIRE", "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE",
)  # fmt: skip

_STICK = "NOOP UP RIGHT LEFT DOWN"
_DIAGONALS = "UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT"
_SHOTS = "UPFIRE RIGHTFIRE LEFTFIRE DOWNFIRE"
_SETS = {
    " ".join(ALL_ACTIONS): "adventure alien bank_heist battle_zone berzerk boxing centipede chopper_command crossbow "
    "darkchambers defender donkey_kong double_dunk earthworld elevator_action entombed et fishing_derby flag_capture "
    "frostbite gravitar hangman haunted_house hero human_cannonball ice_hockey jamesbond kangaroo klax krull "
    "laser_gates mario_bros miniature_golf montezuma_revenge pitfall pitfall2 private_eye riverraid road_runner "
    "robotank seaquest solaris space_war star_gunner superman tennis trondead venture video_cube word_zapper "
    "yars_revenge zaxxon",
    "NOOP FIRE RIGHT LEFT RIGHTFIRE LEFTFIRE": "air_raid carnival demon_attack galaxian name_this_game pong "
    "sir_lancelot space_invaders",
    f"{_STICK} {_DIAGONALS}": "asterix crazy_climber koolaid lost_luggage ms_pacman",
    f"{_STICK} FIRE {_SHOTS}": "amidar mr_do time_pilot wizard_of_wor",
    f"{_STICK} FIRE": "basic_math king_kong qbert",
    "NOOP FIRE UP DOWN UPFIRE DOWNFIRE": "bowling pooyan up_n_down",
    _STICK: "frogger pacman surround",
    f"{_STICK} FIRE {_DIAGONALS}": "othello tic_tac_toe_3d video_chess",
    "NOOP FIRE RIGHTFIRE LEFTFIRE": "atlantis atlantis2",
    "NOOP FIRE UP DOWN": "blackjack casino",
    "NOOP FIRE RIGHT LEFT": "breakout kaboom",
    "NOOP FIRE UP RIGHT LEFT RIGHTFIRE LEFTFIRE": "assault",
    f"{_STICK} FIRE UPRIGHT UPLEFT {_SHOTS} UPRIGHTFIRE UPLEFTFIRE": "asteroids",
    "FIRE RIGHT LEFT": "backgammon",
    "NOOP FIRE UP RIGHT LEFT UPRIGHT UPLEFT RIGHTFIRE LEFTFIRE": "beam_rider",
    "NOOP FIRE RIGHT LEFT DOWN DOWNRIGHT DOWNLEFT RIGHTFIRE LEFTFIRE": "enduro",
    "NOOP UP DOWN": "freeway",
    "NOOP FIRE UP RIGHT LEFT UPFIRE RIGHTFIRE LEFTFIRE": "gopher",
    f"{_STICK} {_DIAGONALS} RIGHTFIRE LEFTFIRE DOWNFIRE UPRIGHTFIRE UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE": (
        "journey_escape"
    ),
    f"{_STICK} FIRE {_DIAGONALS} {_SHOTS}": "keystone_kapers",
    f"{_STICK} DOWNRIGHT DOWNLEFT RIGHTFIRE LEFTFIRE DOWNFIRE UPRIGHTFIRE UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE": (
        "kung_fu_master"
    ),
    "NOOP FIRE RIGHT LEFT DOWN RIGHTFIRE LEFTFIRE DOWNFIRE": "phoenix",
    "NOOP RIGHT LEFT": "skiing",
    "NOOP FIRE RIGHT LEFT DOWN": "tetris",
    f"{_STICK} FIRE {_DIAGONALS} RIGHTFIRE LEFTFIRE": "turmoil",
    f"{_STICK} UPFIRE RIGHTFIRE LEFTFIRE": "tutankham",
    f"FIRE {_DIAGONALS}": "video_checkers",
    f"{_STICK} FIRE UPFIRE RIGHTFIRE LEFTFIRE": "video_pinball",
}

# The package also has joust, combat, maze_craze and warlords, which are for two players: the emulator refuses them.
GAMES: dict[str, tuple[str, ...]] = {
    game: tuple(action for action in ALL_ACTIONS if action in actions.split())
    for actions, games in _SETS.items()
    for game in games.split()
}
WITHOUT_BUTTON = ("lost_luggage", "skiing")  # their full set has the stick's nine positions only


@dataclass(frozen=True, slots=True)
class GameOptions:
    """Options of a game, each of which our own server's reset takes."""

    game: str = "pong"  # one of GAMES
    obs_type: ObsType = "ram"  # 128 bytes of the console's memory; or the screen, flat: rgb 100,800 numbers
    frameskip: int = 4  # frames that an action is held for
    repeat_action_probability: float = 0.0  # sticky actions: the chance that a frame repeats the previous action
    noops: int = 30  # frames without action before the episode: a number from 0 to this, drawn from the seed
    random_frames: int = 0  # frames of random actions before the episode, drawn from the seed
    max_steps: int | None = None  # actions until the episode is over; None: the game decides
    full_action_space: bool = False  # all 18 actions of the console, also those that do nothing in this game
    mode: int | None = None  # of the console's game select switch
    difficulty: int | None = None  # of its difficulty switch

    def __post_init__(self) -> None:
        if self.game not in GAMES:
            near = get_close_matches(self.game.lower().replace(" ", "_"), GAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(GAMES))}"
            raise ValueError(f"game={self.game!r} is not known; {hint}")
        for name, low, high in (("frameskip", 1, 1000), ("noops", 0, 10_000), ("random_frames", 0, 10_000)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must be from {low} to {high}")
        if not 0 <= self.repeat_action_probability < 1:
            raise ValueError(f"repeat_action_probability={self.repeat_action_probability} must be in [0, 1)")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, or none")

    @property
    def actions(self) -> tuple[str, ...]:
        """The emulator's names of the legal actions, indexed by action_id."""
        if not self.full_action_space:
            return GAMES[self.game]
        without = self.game in WITHOUT_BUTTON
        return tuple(action for action in ALL_ACTIONS if not (without and "FIRE" in action))
