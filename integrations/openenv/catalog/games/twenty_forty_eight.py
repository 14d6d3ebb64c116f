"""2048: slide the tiles of a four by four board; equal ones merge into their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from integrations.openenv.catalog.games.game import Game, OpenSpielObservation, spoken

MOVES = {"up": 0, "right": 1, "down": 2, "left": 3}
# Cells in the order in which good play keeps its tiles, the greatest first: row by row, in alternating directions.
SNAKE = (15, 14, 13, 12, 8, 9, 10, 11, 7, 6, 5, 4, 0, 1, 2, 3)

Board = tuple[int, ...]


class TwentyFortyEight(Game):
    """2048: a move pays the sum of the tiles that it made. Tiles appear at random, so no reward is guaranteed."""

    name: ClassVar[str] = "2048"
    default_params: ClassVar[Mapping[str, int]] = {"max_tile": 2048}
    smallest_params: ClassVar[Mapping[str, int]] = {"max_tile": 8}

    def rules(self) -> str:
        return (
            "You play 2048: a move slides all tiles, equal neighbours merge, and you are paid their sum. "
            "Write up, down, left or right between <action> and </action>."
        )

    def examples(self) -> Sequence[tuple[str, str]]:
        return [("0 0 0 2\n0 0 0 2\n0 0 4 8\n0 0 2 16", "down")]

    def view(self, seen: OpenSpielObservation) -> str:
        board = _drawn(self._board(seen))
        if len(seen.legal_actions) == len(MOVES):
            return board
        return f"{board}\nOnly {spoken(list(self.names(seen)))} can be played."

    def names(self, seen: OpenSpielObservation) -> Mapping[str, int]:
        return {word: move for word, move in MOVES.items() if move in seen.legal_actions}

    def end(self, before: OpenSpielObservation, seen: OpenSpielObservation, total: float) -> str:
        return f"{_drawn(self._board(seen))}\nThe game is over. You earned {total:g}."

    def won(self, seen: OpenSpielObservation, total: float) -> bool:
        return max(self._board(seen)) >= self.params["max_tile"]

    def gold(self, seen: OpenSpielObservation) -> int | None:
        """Return the move with the best sum of its pay, free cells and large tiles along SNAKE."""
        board = self._board(seen)

        def worth(move: int) -> float:
            after, paid = _moved(board, move)
            weights = sum(after[cell] * 0.5**place for place, cell in enumerate(SNAKE))
            return weights + paid + 0.5 * max(after) * after.count(0) / 16

        return max(seen.legal_actions, key=worth)

    def unfinished(self, seen: OpenSpielObservation) -> float:
        return 0.0  # what was earned was earned; a turn without a move earns nothing

    def metrics(self, seen: OpenSpielObservation) -> dict[str, float]:
        return {"greatest_tile": float(max(self._board(seen)))}

    def _board(self, seen: OpenSpielObservation) -> Board:
        self.check_size(seen, 16)
        return tuple(int(tile) for tile in seen.info_state)


def _moved(board: Board, move: int) -> tuple[Board, int]:
    """Return the board after a move, before a random tile is added, and what the move pays."""
    lines = [range(4 * line, 4 * line + 4) if move in (1, 3) else range(line, 16, 4) for line in range(4)]
    after, paid = [0] * 16, 0
    for line in lines:
        cells = list(line) if move in (0, 3) else list(line)[::-1]
        slid, earned = _slid([board[cell] for cell in cells if board[cell]])
        paid += earned
        for cell, tile in zip(cells, slid, strict=False):
            after[cell] = tile
    return tuple(after), paid


def _slid(tiles: list[int]) -> tuple[list[int], int]:
    """Slide tiles towards the first and merge equal ones: [2, 2, 4] -> [4, 4], which pays 4."""
    slid: list[int] = []
    paid, can_merge = 0, False
    for tile in tiles:
        if can_merge and slid[-1] == tile:
            slid[-1], can_merge = 2 * tile, False
            paid += 2 * tile
        else:
            slid.append(tile)
            can_merge = True
    return slid, paid


def _drawn(board: Board) -> str:
    return "\n".join(" ".join(str(tile) for tile in board[row : row + 4]) for row in range(0, 16, 4))
