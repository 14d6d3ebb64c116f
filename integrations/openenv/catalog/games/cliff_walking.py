"""cliff_walking: walk along a cliff from the left to the goal on the right without falling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation
from integrations.openenv.client.errors import OpenEnvError

MOVES = {"right": 0, "up": 1, "left": 2, "down": 3}
STEPS = {0: (0, 1), 1: (-1, 0), 2: (0, -1), 3: (1, 0)}  # rows, columns; rows are counted from the top
FALL = -100.0

Cell = tuple[int, int]


class CliffWalking(Game):
    """Cliff walking: pays -1 for each step and -100 for falling, which ends the game, as `horizon` steps do.

    The shaped reward is a hundredth of that, plus the fraction of the shortest way to the goal that a step gains.
    """

    name: ClassVar[str] = "cliff_walking"
    default_params: ClassVar[Mapping[str, int]] = {"height": 4, "width": 8, "horizon": 100}
    smallest_params: ClassVar[Mapping[str, int]] = {"height": 2, "width": 3, "horizon": 1}
    can_shape: ClassVar[bool] = True
    shapes: ClassVar[bool] = True
    shaped_scale: ClassVar[float] = 0.01

    def __init__(self, params: Mapping[str, int], agent_player: int) -> None:
        super().__init__(params, agent_player)
        self.height, self.width, self.horizon = (self.params[name] for name in ("height", "width", "horizon"))
        self.start, self.goal = (self.height - 1, 0), (self.height - 1, self.width - 1)
        reachable = self.fewest_turns <= self.horizon
        self.gold_reward = -float(self.fewest_turns) if reachable else None

    def rules(self) -> str:
        return (
            "You are P and walk to the goal G; X is a cliff. Each step costs, and falling costs most. "
            "Write up, down, left or right between <action> and </action>."
        )

    def examples(self) -> Sequence[tuple[str, str]]:
        middle = self.width // 2
        return [
            (self._drawn((self.height - 2, middle)), "right"),
            (self._drawn((self.height - 2, self.width - 1)), "down"),
        ]

    def view(self, seen: OpenSpielObservation) -> str:
        return self._drawn(self._place(seen))

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        return MOVES

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        return "You reached the goal." if self.won(seen, total) else "You did not reach the goal."

    def won(self, seen: OpenSpielObservation, total: float) -> bool:
        return self._place(seen) == self.goal

    def gold(self, seen: OpenSpielObservation) -> int | None:
        row, column = self._place(seen)
        if column == self.width - 1:
            return MOVES["down"]
        return MOVES["up"] if row == self.height - 1 else MOVES["right"]

    def shaped(self, before: OpenSpielObservation, seen: OpenSpielObservation, paid: float) -> float:
        if paid <= FALL:
            return self.shaped_scale * paid
        gained = self._steps_left(self._place(before)) - self._steps_left(self._place(seen))
        return self.shaped_scale * paid + gained / self.fewest_turns

    @property
    def shaped_gold_reward(self) -> float | None:
        return None if self.gold_reward is None else 1.0 + self.shaped_scale * self.gold_reward

    @property
    def fewest_turns(self) -> int:
        return self._steps_left(self.start)

    def unfinished(self, seen: OpenSpielObservation) -> float:
        return FALL

    def metrics(self, seen: OpenSpielObservation) -> dict[str, float]:
        return {"steps_left": float(self._steps_left(self._place(seen)))}

    def _steps_left(self, place: Cell) -> int:
        """Return the length of the shortest way to the goal; from the bottom row it leads over the row above."""
        row, column = place
        if place == self.goal:
            return 0
        if row == self.height - 1:  # the start, or a fall
            return 1 + self._steps_left((row - 1, column))
        return self.height - 1 - row + self.width - 1 - column

    def _place(self, seen: OpenSpielObservation) -> Cell:
        """Return the player's cell, by replaying the moves. A step into a wall does not move.

        info_state is the history: for each of `horizon` moves four numbers, one-hot, or zeros for a move to come.
        """
        self.check_size(seen, 4 * self.horizon)
        row, column = self.start
        for start in range(0, 4 * self.horizon, 4):
            move = seen.info_state[start : start + 4]
            if sum(move) > 1 or any(value not in (0.0, 1.0) for value in move):
                raise OpenEnvError(f"openspiel_env: a move of cliff_walking is one of four, not {list(move)}")
            if 1.0 not in move:
                break
            down, right = STEPS[move.index(1.0)]
            row, column = min(max(row + down, 0), self.height - 1), min(max(column + right, 0), self.width - 1)
        return row, column

    def _drawn(self, place: Cell) -> str:
        rows = [["."] * self.width for _ in range(self.height)]
        rows[-1][1:-1] = ["X"] * (self.width - 2)
        rows[-1][-1] = "G"
        rows[place[0]][place[1]] = "P"
        return "\n".join("".join(row) for row in rows)
