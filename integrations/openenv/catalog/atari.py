"""atari_env: a few seconds of one of 104 Atari 2600 games; Pong, Breakout and Freeway are described in sentences."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from random import Random
from typing import Any, ClassVar, Self

from integrations.openenv.catalog.atari_games import GameOptions
from integrations.openenv.catalog.atari_views import VIEWS, Sight, changes, picture, words_of
from integrations.openenv.catalog.entry import Answer, CatalogEntry, InvalidAction, Messages, Task, Translator, paid
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.client.session import StepResult

RAM_BYTES = 128
SYNONYMS = {"NOTHING": "NOOP", "NONE": "NOOP", "STAY": "NOOP", "WAIT": "NOOP", "STOP": "NOOP", "SHOOT": "FIRE"}
PARTS = re.compile(r"(?:UP|DOWN|LEFT|RIGHT|FIRE)+")
PART = re.compile(r"UP|DOWN|LEFT|RIGHT|FIRE")
OTHER_FRAMESKIP, OTHER_RANDOM_FRAMES = 12, 0  # for games without a View


@dataclass(frozen=True, slots=True)
class AtariAction:
    """An action by its index among the game's legal ones. The official server ignores the other fields."""

    action_id: int
    game_name: str = "pong"
    obs_type: str = "ram"
    full_action_space: bool = False

    def fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AtariObservation:
    """An observation: the memory (128 numbers), or the screen (flat, row by row)."""

    screen: list[int]
    screen_shape: list[int]
    lives: int

    @classmethod
    def from_fields(cls, observation: dict[str, Any]) -> Self:
        screen, shape, lives = (observation.get(name) for name in ("screen", "screen_shape", "lives"))
        if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise OpenEnvError(f"atari_env: the server's screen_shape={shape!r} is no list of sizes")
        size = 1
        for side in shape:
            size *= side
        if not isinstance(screen, list) or len(screen) != size or not all(type(pixel) is int for pixel in screen):
            raise OpenEnvError(
                f"atari_env: the server's screen is no list of {size} numbers, as its shape {shape} says"
            )
        if len(shape) not in (1, 2, 3) or (len(shape) == 1 and size != RAM_BYTES):
            raise OpenEnvError(f"atari_env: screen_shape={shape} is neither a screen's nor that of {RAM_BYTES} bytes")
        if not isinstance(lives, int):
            raise OpenEnvError(f"atari_env: the server's lives={lives!r} is no number")
        return cls(screen, shape, lives)

    @property
    def memory(self) -> list[int] | None:
        return self.screen if len(self.screen_shape) == 1 else None


@dataclass(frozen=True, slots=True)
class AtariOptions(GameOptions):
    """The options of an episode: a game, played for some turns from a moment that the seed chooses.

    shaped adds to the game's own points, so that a few turns teach something: Pong and Breakout pay each turn
    nearness / max_steps (1 when paddle and ball are level, 0 when 80 pixels apart), Freeway pays the part of the road
    that was crossed (and takes it back on the way down; a whole crossing pays its point instead). Other games: nothing.
    """

    frameskip: int = 0  # frames of a turn; 0: the game's default (pong 6, breakout 14, freeway 20, others 12)
    random_frames: int = -1  # before the episode; -1: the game's default (pong 175, freeway 60, breakout 20, others 0)
    max_steps: int | None = 12  # turns
    shaped: bool = True  # see above; False: the game's points alone, as the official server pays

    def __post_init__(self) -> None:
        view = VIEWS.get(self.game)
        if self.frameskip == 0:
            object.__setattr__(self, "frameskip", view.frameskip if view else OTHER_FRAMESKIP)
        if self.random_frames == -1:
            object.__setattr__(self, "random_frames", view.random_frames if view else OTHER_RANDOM_FRAMES)
        if self.max_steps is None:
            raise ValueError("max_steps=None: an episode needs an end; 100000 is longer than any game")
        GameOptions.__post_init__(self)

    @property
    def turns(self) -> int:
        assert self.max_steps is not None
        return self.max_steps


class AtariEntry(CatalogEntry):
    """One game, one view of it, twelve turns."""

    name: ClassVar[str] = "atari_env"
    image: ClassVar[str] = "ghcr.io/meta-pytorch/openenv-atari-env:latest"
    server_module: ClassVar[str] = "integrations.openenv.servers.atari_env"
    extra: ClassVar[str | None] = "atari-env"
    engine_module: ClassVar[str | None] = "ale_py"
    max_turns: ClassVar[int] = 12
    max_action_chars: ClassVar[int] = 100
    options_type: ClassVar[type] = AtariOptions

    def tasks(self, random: Random, num_tasks: int, options: AtariOptions) -> list[Task]:
        """Return tasks that are all equal; each row's seed makes the difference."""
        usual = asdict(self.read_options({"game": options.game}))
        given = {name: value for name, value in asdict(options).items() if value != usual[name]}
        if options.game != "pong":
            given["game"] = options.game
        return [Task(_prompt(options), family=options.game, options=given)] * num_tasks

    def translator(self, task: Task, options: AtariOptions) -> Translator:
        return AtariTranslator(options)

    def reset_kwargs(self, options: AtariOptions) -> dict[str, Any]:
        return {field.name: getattr(options, field.name) for field in fields(GameOptions)}

    def image_variables(self, options: AtariOptions) -> dict[str, str]:
        """Return the settings of the official image. It has no seed and no random start: its episodes begin alike."""
        variables = {
            "ATARI_GAME": options.game,
            "ATARI_OBS_TYPE": options.obs_type,
            "ATARI_FULL_ACTION_SPACE": str(options.full_action_space).lower(),
            "ATARI_REPEAT_ACTION_PROB": str(options.repeat_action_probability),
            "ATARI_FRAMESKIP": str(options.frameskip),
        }
        switches = {"ATARI_MODE": options.mode, "ATARI_DIFFICULTY": options.difficulty}
        return variables | {name: str(value) for name, value in switches.items() if value is not None}


class AtariTranslator(Translator):
    """Translator that counts turns and points, because the official server ends an episode only when the game ends."""

    def __init__(self, options: AtariOptions) -> None:
        self.options = options
        self.view = VIEWS.get(options.game) if options.obs_type == "ram" else None
        self.words = words_of(options.game)
        self.seen: AtariObservation | None = None
        self.sight: Sight | None = None
        self.score = 0.0
        self.num_steps = 0
        self.lives = 0
        self.wanted_score = self.view.wanted_score if self.view is not None else 1.0
        if self.view is not None and options.shaped and _is_usual(options):
            self.gold_reward = self.view.gold_reward

    def first_text(self, first: StepResult) -> str:
        return self._look(AtariObservation.from_fields(first.observation))

    def action(self, text: str) -> dict[str, Any]:
        name = emulator_name(text, self.words, self.options.actions)
        if name is None:
            raise InvalidAction(f"There is no action {text.strip()[:20]!r}. Write one of {', '.join(self.words)}.")
        place = self.options.actions.index(name)
        game = self.options
        return AtariAction(place, game.game, game.obs_type, game.full_action_space).fields()

    def idle_action(self) -> dict[str, Any]:
        """Return NOOP, because the game runs on (FIRE in the two games without NOOP)."""
        game = self.options
        return AtariAction(0, game.game, game.obs_type, game.full_action_space).fields()

    def answer(self, result: StepResult, *, last_turn: bool) -> Answer:
        points = paid(result, "atari_env")
        progress = self.sight.progress if self.sight else 0.0
        self.num_steps += 1
        self.score += points
        text = self._look(AtariObservation.from_fields(result.observation))
        reward = points
        if self.options.shaped and self.sight is not None:
            reward += (self.sight.nearness or 0.0) / self.options.turns + self.sight.progress - progress
        ended = result.done or self.num_steps >= self.options.turns
        self.success = ended and self.score >= self.wanted_score
        return Answer(f"{_points_text(points)}{text}", reward, ended)

    def gold_action(self) -> str | None:
        return self.sight.gold if self.sight is not None else None

    def metrics(self) -> dict[str, float]:
        return {"score": self.score, "lives": float(self.lives)}

    def _look(self, seen: AtariObservation) -> str:
        before, self.seen, self.lives = self.seen, seen, seen.lives
        if seen.memory is None:
            return picture(seen.screen, seen.screen_shape)
        last = before.memory if before is not None else None
        if self.view is not None:
            self.sight = self.view.look(seen.memory, last)
            return self.sight.text
        told = [f"Score {self.score:g}.", f"Lives {seen.lives}." if seen.lives else "", changes(seen.memory, last)]
        return " ".join(part for part in told if part)


def emulator_name(text: str, words: dict[str, str], actions: tuple[str, ...]) -> str | None:
    """Return the emulator's name of the action that the model wrote; None if it is none that is legal.

    words: the offered words and their actions. A number or another spelling of a legal action is read too.
    """
    said = "".join(character for character in text.upper() if character.isalnum() and character.isascii())
    if said in words:
        return words[said]
    if said.isdigit() and len(said) <= 2 and int(said) < len(actions):
        return actions[int(said)]
    name = SYNONYMS.get(said, said)
    if PARTS.fullmatch(name):  # "fire left" is LEFTFIRE
        parts = PART.findall(name)
        name = "".join(part for part in ("UP", "DOWN", "RIGHT", "LEFT", "FIRE") if part in parts)
    return name if name in actions else None


def _prompt(options: AtariOptions) -> Messages:
    """Return the prompt: the task, and two example turns as earlier messages."""
    view, words = VIEWS.get(options.game), ", ".join(words_of(options.game))
    form = f"Answer with one of {words} between <action> and </action>."
    if view is None or options.obs_type != "ram":
        told = options.game.replace("_", " ").title()
        return [{"role": "user", "content": f"You play {told} on an Atari 2600. Score points. {form}"}]
    messages: Messages = []
    for read, answered in view.examples:
        messages.append({"role": "user", "content": read})
        messages.append({"role": "assistant", "content": f"<action>{answered}</action>"})
    messages[0]["content"] = f"{view.task} {form}\n\n{messages[0]['content']}"
    return [*messages, {"role": "user", "content": "A new game."}]


def _is_usual(options: AtariOptions) -> bool:
    return options == AtariOptions(game=options.game)


def _points_text(points: float) -> str:
    if points == 0:
        return ""
    return f"You {'won' if points > 0 else 'lost'} {abs(points):g} point{'' if abs(points) == 1 else 's'}. "
