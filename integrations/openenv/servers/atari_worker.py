"""Worker of one session, which runs one Atari console.

ale-py holds Python's global lock while it emulates, and ends the process for some ROMs, so each session has its own
process.

    {"reset": {...options...}, "seed": 7}   a console with this game, freshly loaded
    {"act": 2}                              one action, held for `frameskip` frames

Both requests are answered with the fields of an observation, or {"refused": why}.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from ale_py import Action, ALEInterface, LoggerMode, roms

from integrations.openenv.catalog.atari_games import GameOptions
from integrations.openenv.catalog.options import read_options

HELD_FRAMES = 8  # of a random action before the episode
ALEInterface.setLoggerMode(LoggerMode.Error)


class CannotPlay(ValueError):
    """The game cannot be played with these options or this action."""


class Console:
    """One episode. The same options, seed and actions give the same observations and rewards.

    Each episode loads a new console, because many games keep state over `reset_game`.
    """

    def __init__(self, options: GameOptions, seed: int | None) -> None:
        self.options = options
        self._random = Random(seed)
        self._ale = ALEInterface()
        self._ale.setInt("random_seed", 0)
        self._ale.setFloat("repeat_action_probability", 0.0)  # drawn here instead, from the seed
        rom = roms.get_rom_path(options.game)
        if rom is None:
            raise CannotPlay(f"game={options.game!r} is not in this ale-py; 0.12.1 has it")
        self._ale.loadROM(rom)
        self._set_switches()
        self._ale.reset_game()
        self._actions = self._ale.getLegalActionSet() if options.full_action_space else self._ale.getMinimalActionSet()
        self._held = self._actions[0]
        if seed is not None:
            self._play_before_the_episode()
        self._held = Action.NOOP
        self._over = False
        self._num_steps = 0

    def act(self, action_id: int) -> dict[str, Any]:
        """Hold an action for `frameskip` frames and return the observation.

        After the end of the episode nothing moves and the reward is 0.
        """
        if not 0 <= action_id < len(self._actions):
            raise CannotPlay(f"action_id={action_id} must be from 0 to {len(self._actions) - 1}")
        reward = 0.0
        if not self._over:
            reward = self._hold(self._actions[action_id], self.options.frameskip)
            self._num_steps += 1
            self._over = self._ale.game_over() or self._num_steps == self.options.max_steps
        return self.observed(reward)

    def observed(self, reward: float) -> dict[str, Any]:
        screen = {
            "rgb": self._ale.getScreenRGB,
            "grayscale": self._ale.getScreenGrayscale,
            "ram": self._ale.getRAM,
        }[self.options.obs_type]()
        return {
            "screen": screen.ravel().tolist(),
            "screen_shape": list(screen.shape),
            "lives": int(self._ale.lives()),
            "episode_frame_number": int(self._ale.getEpisodeFrameNumber()),
            "frame_number": int(self._ale.getFrameNumber()),
            "legal_actions": list(range(len(self._actions))),
            "reward": reward,
            "done": self._over,
            "truncated": self._over and not self._ale.game_over(),
        }

    def _hold(self, action: Action, num_frames: int) -> float:
        """Hold an action and return the points of these frames.

        Sticky actions are drawn frame by frame (Machado et al. 2018, section 5.2).
        """
        points = 0
        for _ in range(num_frames):
            if not self._random.random() < self.options.repeat_action_probability:
                self._held = action
            points += self._ale.act(self._held)
            if self._ale.game_over():
                break
        return float(points)

    def _play_before_the_episode(self) -> None:
        """Play random frames, so that seeds lead to different episodes. A game that ends meanwhile begins again."""
        for _ in range(self._random.randint(0, self.options.noops)):
            self._ale.act(Action.NOOP)
        action = Action.NOOP
        for frame in range(self.options.random_frames):
            if frame % HELD_FRAMES == 0:
                action = self._random.choice(self._actions)
            self._ale.act(action)
            if self._ale.game_over():
                self._ale.reset_game()

    def _set_switches(self) -> None:
        for name, value, allowed, switch in (
            ("mode", self.options.mode, self._ale.getAvailableModes(), self._ale.setMode),
            ("difficulty", self.options.difficulty, self._ale.getAvailableDifficulties(), self._ale.setDifficulty),
        ):
            if value is None:
                continue
            if value not in allowed:
                raise CannotPlay(f"{name}={value} is not one of {self.options.game}'s: {', '.join(map(str, allowed))}")
            switch(value)


def make_answer(_: None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    console: Console | None = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal console
        try:
            if "reset" in request:
                options = read_options(GameOptions, request["reset"], "atari_env")
                console = Console(options, request["seed"])
                return console.observed(0.0)
            assert console is not None
            return console.act(request["act"])
        except CannotPlay as refused:
            return {"refused": str(refused)}

    return answer
