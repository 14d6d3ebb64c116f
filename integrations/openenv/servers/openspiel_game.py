"""A game of OpenSpiel, played by one player against chance and seeded opponents.

    python -m integrations.openenv.servers.openspiel_game '{"game": "catch", "game_params": {"rows": 4}}'

plays one game at random and prints nothing if that succeeded. It is a trial: parameters that the engine does not check
can crash it (catch with 0 rows does), and a crash of the server would end all its sessions.
"""

from __future__ import annotations

import functools
import json
import math
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from random import Random
from typing import Any

import pyspiel  # ty: ignore[import-not-found]

OPPONENTS = ("random", "first", "last", "middle")  # of the legal actions: the official ones
DOCUMENTED = ("catch", "tic_tac_toe", "kuhn_poker", "cliff_walking", "2048", "blackjack")
MAX_INFO_STATE = 100_000  # floats; an observation of more is refused
TRIAL_S, TRIAL_BYTES, TRIAL_MOVES = 20, 2 * 1024**3, 300
_ONE_TRIAL = threading.Lock()


@dataclass(frozen=True, slots=True)
class Setup:
    """The game, its parameters, the player's number and the opponents' policy."""

    game: str
    game_params: Mapping[str, Any] = field(default_factory=dict)
    agent_player: int = 0
    opponent: str = "random"

    def __post_init__(self) -> None:
        if not isinstance(self.game, str):
            raise ValueError(f"game={self.game!r} must be the name of a game")
        if not isinstance(self.game_params, Mapping):
            raise ValueError(f"game_params={self.game_params!r} must be an object: names and values")
        if self.opponent not in OPPONENTS:
            raise ValueError(f"opponent={self.opponent!r} must be one of {', '.join(OPPONENTS)}")
        if not isinstance(self.agent_player, int) or isinstance(self.agent_player, bool) or self.agent_player < 0:
            raise ValueError(f"agent_player={self.agent_player!r} must be the number of a player, from 0")


class Play:
    """One game from its start to its end. The same setup, seed and moves give the same game."""

    def __init__(self, setup: Setup, game: Any, seed: int | None) -> None:
        self.setup = setup
        self.num_players: int = game.num_players()
        if setup.agent_player >= self.num_players:
            raise ValueError(
                f"agent_player={setup.agent_player}, but {setup.game} has players 0 to {self.num_players - 1}"
            )
        self._tensor, self._strings = _tensor_name(game), _string_name(game)
        lowest = game.min_utility()
        self.lowest_return: float | None = float(lowest) if math.isfinite(lowest) else None
        self.num_moves = 0  # the opponents' included
        self.is_first = True
        self.opponent_last_action: int | None = None
        self._chance, self._opponent = (
            Random() if seed is None else Random(f"{role} {seed}") for role in ("chance", "opponent")
        )
        self._state = game.new_initial_state()
        self._let_others_move()

    def move(self, action: int) -> None:
        """Play the player's move, then all others until it is the player's turn again; ValueError if it is illegal."""
        legal = self.legal_actions
        if action not in legal:
            raise ValueError(f"action_id={action} is not legal in {self.setup.game} now; legal: {legal}")
        self._apply(action)
        self._let_others_move()

    @property
    def is_over(self) -> bool:
        return self._state.is_terminal()

    @property
    def reward(self) -> float:
        """The player's reward for the last move that was made; 0 if the engine's is not finite."""
        reward = float(self._state.rewards()[self.setup.agent_player])
        return reward if math.isfinite(reward) else 0.0

    @property
    def current_player(self) -> int:
        return int(self._state.current_player())

    @property
    def legal_actions(self) -> list[int]:
        return [] if self.is_over else [int(action) for action in self._state.legal_actions(self.setup.agent_player)]

    @property
    def info_state(self) -> list[float]:
        if self._tensor is None:
            return []
        return [float(value) for value in getattr(self._state, self._tensor)(self.setup.agent_player)]

    @property
    def text(self) -> str:
        """The engine's text of what this player may know: the state's own text would show the others' cards."""
        return "" if self._strings is None else str(getattr(self._state, self._strings)(self.setup.agent_player))

    def name_of(self, action: int) -> str:
        return str(self._state.action_to_string(self.setup.agent_player, action))

    def _let_others_move(self) -> None:
        state = self._state
        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, probabilities = zip(*state.chance_outcomes(), strict=True)
                state.apply_action(self._chance.choices(outcomes, probabilities)[0])
            elif state.current_player() == self.setup.agent_player:
                return
            else:
                self.opponent_last_action = self._opponents_choice(state.legal_actions())
                self._apply(self.opponent_last_action)

    def _apply(self, action: int) -> None:
        self._state.apply_action(action)
        self.num_moves += 1
        self.is_first = False

    def _opponents_choice(self, legal: list[int]) -> int:
        if self.setup.opponent == "random":
            return self._opponent.choice(legal)
        return legal[{"first": 0, "middle": len(legal) // 2, "last": -1}[self.setup.opponent]]


def play_of(*, game: str, game_params: dict[str, Any], agent_player: int, opponent: str, seed: int | None) -> Play:
    """Start a game; ValueError says which option is wrong and which values there are."""
    setup = Setup(game, game_params, agent_player, opponent)
    kind = _sequential_game(game)
    params = dict(game_params)
    if seed is not None and "rng_seed" in kind.parameter_specification:  # such a game has its own random numbers
        params.setdefault("rng_seed", Random(f"engine {seed}").randrange(1, 2**31))
    if game not in DOCUMENTED or game_params:
        _check_by_trial(json.dumps({"game": game, "game_params": game_params}, sort_keys=True))
    return Play(setup, _loaded(game, params), seed)


def _sequential_game(name: str) -> Any:
    """Return the engine's type of a turn-based game; ValueError names the nearest ones."""
    kinds = {kind.short_name: kind for kind in pyspiel.registered_games()}
    playable = [name for name, kind in kinds.items() if kind.dynamics == pyspiel.GameType.Dynamics.SEQUENTIAL]
    if name in playable:
        return kinds[name]
    nearest = get_close_matches(str(name), playable, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"documented: {', '.join(DOCUMENTED)}"
    if name in kinds:
        raise ValueError(
            f"game={name!r}: its players move at the same time, and only turn-based games are served; {hint}"
        )
    raise ValueError(f"game={name!r} is not a game of OpenSpiel {pyspiel.__version__}; {hint}")


def _loaded(game: str, params: dict[str, Any]) -> Any:
    words = f"game={game!r} with game_params={params}"
    try:
        loaded = pyspiel.load_game(game, params)
        tensor = _tensor_name(loaded)
        size = 1 if tensor is None else getattr(loaded, f"{tensor}_size")()
    except (pyspiel.SpielError, TypeError, ValueError) as refused:
        raise ValueError(f"{words}: {str(refused).strip()[:300]}") from None
    if not 1 <= size <= MAX_INFO_STATE:
        raise ValueError(f"{words}: an observation would have {size} numbers; it must have 1 to {MAX_INFO_STATE}")
    return loaded


def _tensor_name(game: Any) -> str | None:
    """Return the name of the engine's method for a player's tensor, chosen as in its own RL environment."""
    kind = game.get_type()
    if kind.provides_information_state_tensor:
        return "information_state_tensor"
    return "observation_tensor" if kind.provides_observation_tensor else None


def _string_name(game: Any) -> str | None:
    kind = game.get_type()
    if kind.provides_observation_string:
        return "observation_string"
    return "information_state_string" if kind.provides_information_state_string else None


def _check_by_trial(words: str) -> None:
    """Play a trial game in a separate process, once for all sessions; ValueError says how it failed."""
    with _ONE_TRIAL:
        complaint = _complaint(words)
    if complaint is not None:
        raise ValueError(complaint)


@functools.lru_cache(maxsize=1024)
def _complaint(words: str) -> str | None:
    command = [sys.executable, "-P", "-m", "integrations.openenv.servers.openspiel_game", words]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"{words}: a trial game did not end within {TRIAL_S} s"
    if trial.returncode < 0:
        return f"{words}: the engine crashes with these game_params (signal {-trial.returncode})"
    return trial.stdout.strip()[-500:] or f"{words}: a trial game failed" if trial.returncode else None


def _trial(words: str) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spec = json.loads(words)
    try:
        play = Play(Setup(**spec), _loaded(spec["game"], spec["game_params"]), seed=0)
        if play.is_over:
            raise ValueError("the game is over before the first move")
        random = Random(0)
        while not play.is_over and play.num_moves < TRIAL_MOVES:
            play.move(random.choice(play.legal_actions))
            _ = play.info_state, play.text, [play.name_of(action) for action in play.legal_actions]
    except (ValueError, IndexError, MemoryError, pyspiel.SpielError) as failed:
        print(failed if str(failed).startswith("game=") else f"{words}: {type(failed).__name__}: {failed}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_trial(sys.argv[1]))
