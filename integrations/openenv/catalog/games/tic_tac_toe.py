"""tic_tac_toe: three in a row on three by three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation
from integrations.openenv.client.errors import OpenEnvError

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
FREE, O, X = " ", "o", "x"  # noqa: E741  (the letters on the board)


class TicTacToe(Game):
    """Tic-tac-toe: pays +1 for winning, 0 for a draw, -1 for losing. Player 0 is x and begins."""

    name: ClassVar[str] = "tic_tac_toe"
    num_players: ClassVar[int] = 2
    gold_reward = 0.0  # perfect play never loses

    def rules(self) -> str:
        return (
            f"You play tic-tac-toe as {self._mark()}. Three in a row, column or diagonal win. "
            "Write the number of a free cell between <action> and </action>."
        )

    def examples(self) -> Sequence[tuple[str, str]]:
        me, other = self._mark(), self._mark(other=True)
        return [(_drawn(f"{me}{me} {other}{other}    "), "2")]

    def view(self, seen: OpenSpielObservation) -> str:
        return _drawn(self._board(seen))

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        return {str(cell): cell for cell in seen.legal_actions}

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        return f"{_drawn(self._board(seen), numbered=False)}\n{super().end(before, seen, total)}"

    def gold(self, seen: OpenSpielObservation) -> int | None:
        board, me = self._board(seen), self._mark()
        return max(seen.legal_actions, key=lambda cell: -_value(_with(board, cell, me), self._mark(other=True)))

    @property
    def fewest_turns(self) -> int:
        return 3

    def unfinished(self, seen: OpenSpielObservation) -> float:
        return -1.0

    def _mark(self, *, other: bool = False) -> str:
        return X if (self.agent_player == 0) != other else O

    def _board(self, seen: OpenSpielObservation) -> str:
        """Return the board as nine characters.

        info_state has a plane of nine numbers for free cells, one for o and one for x.
        """
        self.check_size(seen, 27)
        planes = [seen.info_state[start : start + 9] for start in (0, 9, 18)]
        if any(sorted(cell) != [0.0, 0.0, 1.0] for cell in zip(*planes, strict=True)):
            raise OpenEnvError("openspiel_env: a cell of tic_tac_toe is free, o or x, and this board has another one")
        return "".join((FREE, O, X)[cell.index(1.0)] for cell in zip(*planes, strict=True))


def _with(board: str, cell: int, mark: str) -> str:
    return board[:cell] + mark + board[cell + 1 :]


@cache
def _value(board: str, to_move: str) -> float:
    """Return the value for the player to move, by minimax: 1 won, 0 drawn, -1 lost, times 0.99 per move until then."""
    if any(board[a] == board[b] == board[c] != FREE for a, b, c in LINES):
        return -1.0
    free = [cell for cell in range(9) if board[cell] == FREE]
    if not free:
        return 0.0
    return 0.99 * max(-_value(_with(board, cell, to_move), O if to_move == X else X) for cell in free)


def _drawn(board: str, *, numbered: bool = True) -> str:
    cells = [str(cell) if numbered and mark == FREE else mark for cell, mark in enumerate(board)]
    return "\n".join(" ".join(cell if cell != FREE else "." for cell in cells[row : row + 3]) for row in (0, 3, 6))
