"""catch: a ball falls through a grid, one row a turn; a paddle in the bottom row must be under it at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation
from integrations.openenv.client.errors import OpenEnvError

MOVES = {"left": 0, "stay": 1, "right": 2}
REPLY_FORM = "Reply only with <action>left</action>, <action>stay</action> or <action>right</action>."


class Catch(Game):
    """Catch: pays +1 for catching the ball or -1 for missing it, at the last of rows - 1 moves.

    The shaped reward adds 1 / (rows - 1) for each move that goes towards the ball or stays under it, and subtracts as
    much for each missing move. It is the default: an untrained small model writes a readable move in about half of its
    turns and so finishes hardly any game, and a plain reward of -1 for all of them teaches nothing.

    The view has two rows, the ball's and the paddle's (ten would cost 22 tokens a turn), and says where the ball is:
    SmolLM2-135M-Instruct learns to follow that, not to compare columns. Measured with it on all 25 positions of a first
    turn: "Ball 5, paddle 3." does not change what it plays, whatever the numbers; with "The ball is to the right." and
    these rules half of its replies are well formed, and the likeliest one is right in 0.84 of the positions. Longer
    rules ("A ball o falls. Move your paddle x under it.") make it play right whatever it is shown.
    """

    name: ClassVar[str] = "catch"
    default_params: ClassVar[Mapping[str, int]] = {"rows": 10, "columns": 5}
    smallest_params: ClassVar[Mapping[str, int]] = {"rows": 2, "columns": 1}
    can_shape: ClassVar[bool] = True
    shapes: ClassVar[bool] = True

    def __init__(self, params: Mapping[str, int], agent_player: int) -> None:
        super().__init__(params, agent_player)
        self.rows, self.columns = self.params["rows"], self.params["columns"]
        farthest = self.columns // 2  # the paddle starts in column columns // 2, counted from 0
        self.gold_reward = 1.0 if farthest <= self.rows - 1 else None

    def rules(self) -> str:
        return f"Move under the ball. {REPLY_FORM}"

    def examples(self) -> Sequence[tuple[str, str]]:
        centre, last = self.columns // 2, self.columns - 1
        return [(self._drawn(last, centre), "right"), (self._drawn(0, centre), "left"), (self._drawn(1, 1), "stay")]

    def view(self, seen: OpenSpielObservation) -> str:
        _, ball, paddle = self._where(seen)
        return self._drawn(ball, paddle)

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        return MOVES

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        return "You caught the ball." if total > 0 else "You missed the ball."

    def gold(self, seen: OpenSpielObservation) -> int | None:
        _, ball, paddle = self._where(seen)
        return 1 + (ball > paddle) - (ball < paddle)

    def shaped(self, before: OpenSpielObservation, seen: OpenSpielObservation, paid: float) -> float:
        was, now = self._distance(before, before), self._distance(before, seen)
        return paid + (now < was or now == 0) / (self.rows - 1)

    def shaped_unfinished(self, seen: OpenSpielObservation, plain: float) -> float:
        ball_row, _, _ = self._where(seen)
        return plain - (self.rows - 1 - ball_row) / (self.rows - 1)

    @property
    def shaped_gold_reward(self) -> float | None:
        return None if self.gold_reward is None else self.gold_reward + 1.0

    @property
    def fewest_turns(self) -> int:
        return self.rows - 1

    def _where(self, seen: OpenSpielObservation) -> tuple[int, int, int]:
        """Return the ball's row, its column and the paddle's column, from 0.

        The ball reaches the bottom row, where the paddle is, only at the end.
        """
        self.check_size(seen, self.rows * self.columns)
        marks = [divmod(index, self.columns) for index, value in enumerate(seen.info_state) if value]
        if not 1 <= len(marks) <= 2 or marks[-1][0] != self.rows - 1:
            raise OpenEnvError(f"openspiel_env: catch shows a ball and a paddle at the bottom, not {marks[:5]}")
        return *marks[0], marks[-1][1]

    def _distance(self, before: OpenSpielObservation, seen: OpenSpielObservation) -> int:
        """Return the columns between ball and paddle.

        In the bottom row the two look alike: the ball is the one in the column that it had in `before`.
        """
        _, ball, _ = self._where(before)
        _, *columns = self._where(seen)
        return max(abs(column - ball) for column in columns)

    def _drawn(self, ball: int, paddle: int) -> str:
        rows = [
            "." * column + mark + "." * (self.columns - 1 - column) for column, mark in ((ball, "o"), (paddle, "x"))
        ]
        where = "above you" if ball == paddle else f"to the {'left' if ball < paddle else 'right'}"
        return "\n".join([*rows, f"The ball is {where}."])
