"""openspiel_env: a game of OpenSpiel. games/ has a file for each game; this file holds what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, ClassVar

from integrations.openenv.catalog.entry import Answer, CatalogEntry, InvalidAction, Messages, Task, Translator, paid
from integrations.openenv.catalog.games import GAMES, OpenSpielObservation, game_of
from integrations.openenv.catalog.games.game import spoken
from integrations.openenv.client.session import StepResult

OPPONENTS = ("random", "first", "last", "middle")
MAX_WORD_CHARS = 100  # of a move


@dataclass(frozen=True, slots=True)
class OpenSpielAction:
    """A move: one of the observation's legal_actions. The server accepts the other two fields and ignores them."""

    action_id: int
    game_name: str = "catch"
    game_params: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        return {"action_id": self.action_id, "game_name": self.game_name, "game_params": dict(self.game_params)}


@dataclass(frozen=True, slots=True)
class OpenSpielOptions:
    """The game, its parameters and the opponents."""

    game: str = (
        "catch"  # or tic_tac_toe, kuhn_poker, cliff_walking, 2048, blackjack; with our server any turn-based one
    )
    opponent: str = "random"  # which of its legal moves it plays: random, first, last or middle
    agent_player: int = 0  # which player the model is
    game_params: Mapping[str, Any] = field(default_factory=dict)  # like rows of catch; with our own server only
    shaped_reward: bool | None = None  # for catch and cliff_walking, see games/; None: the game's default

    def __post_init__(self) -> None:
        if not self.game:
            raise ValueError("game='' must name a game, like catch")
        if self.opponent not in OPPONENTS:
            raise ValueError(f"opponent={self.opponent!r} must be one of {', '.join(OPPONENTS)}")
        if self.agent_player < 0:
            raise ValueError(f"agent_player={self.agent_player} must be the number of a player, from 0")
        known = GAMES.get(self.game)
        if known is None and self.shaped_reward:
            raise ValueError(f"shaped_reward=true: {self.game} has none; {_shapeable()} have one")
        if known is not None:
            self._check_known_game()

    def _check_known_game(self) -> None:
        known = GAMES[self.game]
        if self.shaped_reward and not known.can_shape:
            raise ValueError(f"shaped_reward=true: {self.game} has none; {_shapeable()} have one")
        if self.agent_player >= known.num_players:
            raise ValueError(f"agent_player={self.agent_player}: {self.game} has {known.num_players} player(s), from 0")
        for name, value in self.game_params.items():
            if name not in known.default_params:
                there = ", ".join(known.default_params) or "none"
                raise ValueError(f"game_params: {self.game} has no parameter {name!r}; it has {there}")
            least = known.smallest_params[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"game_params: {name}={value!r} of {self.game} must be a whole number from {least}")

    @property
    def is_shaped(self) -> bool:
        known = GAMES.get(self.game)
        return bool(known and known.shapes) if self.shaped_reward is None else self.shaped_reward

    def differing(self) -> dict[str, Any]:
        """Return the game and the options that differ from the default, for a data set's row."""
        values, default = asdict(self), asdict(OpenSpielOptions())
        return {name: value for name, value in values.items() if name == "game" or value != default[name]}


class OpenSpielEntry(CatalogEntry):
    """One game. All its tasks have the same prompt; the seed of the environment's reset makes the difference."""

    name: ClassVar[str] = "openspiel_env"
    image: ClassVar[str] = "ghcr.io/meta-pytorch/openenv-openspiel-env:latest"
    server_module: ClassVar[str] = "integrations.openenv.servers.openspiel_env"
    extra: ClassVar[str | None] = "openspiel-env"
    engine_module: ClassVar[str | None] = "pyspiel"
    max_turns: ClassVar[int] = 30  # enough for all six but 2048, which may go on for hundreds of moves
    max_action_chars: ClassVar[int] = 1000
    options_type: ClassVar[type] = OpenSpielOptions

    def tasks(self, random: Random, num_tasks: int, options: OpenSpielOptions) -> list[Task]:
        prompt = _prompt(options)
        return [Task(prompt, family=options.game, options=options.differing()) for _ in range(num_tasks)]

    def translator(self, task: Task, options: OpenSpielOptions) -> Translator:
        return OpenSpielTranslator(options)

    def reset_kwargs(self, options: OpenSpielOptions) -> dict[str, Any]:
        return {name: value for name, value in asdict(options).items() if name != "shaped_reward"}

    def image_variables(self, options: OpenSpielOptions) -> dict[str, str]:
        return {
            "OPENSPIEL_GAME": options.game,
            "OPENSPIEL_AGENT_PLAYER": str(options.agent_player),
            "OPENSPIEL_OPPONENT_POLICY": options.opponent,
        }

    def fewest_turns(self, options: OpenSpielOptions) -> int:
        return game_of(options.game, options.game_params, options.agent_player).fewest_turns


class OpenSpielTranslator(Translator):
    """Translator for one game. The reward is the server's, or the shaped one computed from it."""

    def __init__(self, options: OpenSpielOptions) -> None:
        self.options = options
        self.game = game_of(options.game, options.game_params, options.agent_player)
        self.gold_reward = self.game.shaped_gold_reward if options.is_shaped else self.game.gold_reward
        self.seen: OpenSpielObservation | None = None  # the last observation
        self.total = 0.0  # rewards of the server so far

    def first_text(self, first: StepResult) -> str:
        self.seen = OpenSpielObservation.from_fields(first.observation)
        return self.game.view(self.seen)

    def action(self, text: str) -> dict[str, Any]:
        seen = self._seen()
        if not seen.legal_actions:  # the game was over before the first move; the server answers done to any
            return OpenSpielAction(0, self.options.game).fields()
        names = self.game.names(seen)
        word = " ".join(text[:MAX_WORD_CHARS].split()).strip(" .!\"'").casefold()
        for name, action in names.items():
            if name.casefold() == word:
                return OpenSpielAction(action, self.options.game).fields()
        if word.isascii() and word.isdigit() and len(word) < 10 and int(word) in seen.legal_actions:
            return OpenSpielAction(int(word), self.options.game).fields()
        said = "Your action is empty." if not word else "That is not a legal move now."
        moves = spoken(list(names)[: len(seen.legal_actions)])
        raise InvalidAction(f"{said} Write {moves} between <action> and </action>.")

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        before, seen = self._seen(), OpenSpielObservation.from_fields(result.observation)
        points = paid(result, "openspiel_env")
        self.seen, self.total = seen, self.total + points
        reward = self.game.shaped(before, seen, points) if self.options.is_shaped else points
        if not result.done:
            return Answer(self.game.view(seen), reward, ended=False)
        self.success = self.game.won(seen, self.total)
        return Answer(self.game.end(before, seen, self.total), reward, ended=True)

    def unfinished_reward(self) -> float:
        plain = self.game.unfinished(self._seen())
        return self.game.shaped_unfinished(self._seen(), plain) if self.options.is_shaped else plain

    def gold_action(self) -> str | None:
        seen = self._seen()
        gold = self.game.gold(seen) if seen.legal_actions else None
        return next((name for name, action in self.game.names(seen).items() if action == gold), None)

    def metrics(self) -> dict[str, float]:
        return {"score": self.total, **({} if self.seen is None else self.game.metrics(self.seen))}

    def _seen(self) -> OpenSpielObservation:
        if self.seen is None:
            raise RuntimeError("openspiel_env: first_text comes first")
        return self.seen


def _prompt(options: OpenSpielOptions) -> Messages:
    """Return the prompt: the rules as a system message (it helps small models keep the form), then example turns."""
    game = game_of(options.game, options.game_params, options.agent_player)
    messages = [{"role": "system", "content": game.rules()}]
    for view, move in game.examples():
        messages += [
            {"role": "user", "content": view},
            {"role": "assistant", "content": f"<action>{move}</action>"},
        ]
    return [*messages, {"role": "user", "content": "A new game."}]


def _shapeable() -> str:
    return " and ".join(name for name, game in GAMES.items() if game.can_shape)
