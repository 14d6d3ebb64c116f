"""Parser of orders for stocks: "buy AAPL, sell JPM", "AAPL 0.5, JPM -1", "[0.5, -1]", "hold"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isnan, nan

from integrations.openenv.catalog.entry import InvalidAction

TOKEN = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)%?(?![A-Za-z0-9.])|[A-Za-z0-9][A-Za-z0-9.\-]*|[^\s\[\](){}:=\"'`$*]")
NUMBER = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(%?)")
SIGNS = {"buy": 1.0, "sell": -1.0, "hold": 0.0, "keep": 0.0, "wait": 0.0}
FILLERS = {"and", "of", "the", "all", "both", "everything", "share", "shares", "stock", "stocks", "my"}
SEPARATORS = {",", ";"}


def read_orders(text: str, stocks: Sequence[str]) -> list[float]:
    """Return a number in [-1, 1] per stock, 0 for those not named; InvalidAction says what cannot be read.

    An order is a verb, a stock, an amount, or some of these. A verb is for all that follows it up to the next one, and
    alone it is for every stock. An amount stands beside its stock: 0.5 and 50% are half; more than 1 counts as 1.
    """
    tokens = TOKEN.findall(text)
    if not tokens:
        raise InvalidAction(f"Your action is empty. {legal_orders(stocks)}")
    if all(NUMBER.fullmatch(token) or token in SEPARATORS for token in tokens):
        return _listed([_amount(token) for token in tokens if token not in SEPARATORS], stocks)
    return _Reader(stocks).read(tokens)


def legal_orders(stocks: Sequence[str]) -> str:
    """Return examples of valid orders for these stocks, for messages."""
    first, last = stocks[0], stocks[-1]
    examples = f'"buy {first}", "sell {last}", "{first} 0.5"'
    return f'Your stocks are {", ".join(stocks)}. Write for example {examples} or "hold".'


class _Reader:
    """State machine that reads the tokens once, from left to right."""

    def __init__(self, stocks: Sequence[str]) -> None:
        self.stocks = stocks
        self.index = {stock.upper(): n for n, stock in enumerate(stocks)}
        self.orders: dict[int, float] = {}
        self.sign: float | None = None  # of the last verb
        self.is_used = True  # the last verb has a stock
        self.amount: float | None = None  # an amount whose stock may follow
        self.stock: int | None = None  # the last one named, while its amount may follow

    def read(self, tokens: Sequence[str]) -> list[float]:
        for token in tokens:
            word = token.lower().rstrip(".")
            if token.upper() in self.index:
                self._name(self.index[token.upper()])
            elif word.upper() in self.index:
                self._name(self.index[word.upper()])
            elif word in SIGNS:
                self._verb(SIGNS[word])
            elif NUMBER.fullmatch(token):
                self._number(_amount(token))
            elif token in SEPARATORS:
                self.stock = None
            elif word not in FILLERS and token not in {".", "!"}:
                raise InvalidAction(f'"{token[:20]}" is no order and no stock of yours. {legal_orders(self.stocks)}')
        self._end_verb()
        missing = [self.stocks[n] for n, amount in self.orders.items() if isnan(amount)]
        if missing or self.amount is not None:
            raise InvalidAction(
                f"It is not clear what to do with {', '.join(missing) or 'a number'}. {legal_orders(self.stocks)}"
            )
        return [self.orders.get(n, 0.0) for n in range(len(self.stocks))]

    def _verb(self, sign: float) -> None:
        if self.stock is not None and isnan(self.orders[self.stock]):  # "AAPL: buy"
            self.orders[self.stock] = sign
            return
        self._end_verb()
        self.sign, self.is_used, self.stock = sign, False, None

    def _end_verb(self) -> None:
        """Finish a verb: without a stock it is for every stock."""
        if not self.is_used:
            amount, self.is_used = self.amount, True
            for stock in range(len(self.stocks)):
                self.amount = amount
                self._name(stock)

    def _name(self, stock: int) -> None:
        if stock in self.orders:
            raise InvalidAction(f"{self.stocks[stock]} is named twice. {legal_orders(self.stocks)}")
        self.orders[stock] = self._signed(self.amount)
        self.is_used, self.stock, self.amount = True, stock, None

    def _number(self, amount: float) -> None:
        if self.stock is None:
            self.amount = amount
        else:
            order = self.orders[self.stock]
            self.orders[self.stock], self.stock = amount if isnan(order) else order * abs(amount), None

    def _signed(self, amount: float | None) -> float:
        """Return the signed order; NaN if neither a verb nor an amount says yet whether to buy or to sell."""
        if self.sign is None:
            return nan if amount is None else amount
        return self.sign * (1.0 if amount is None else abs(amount))


def _listed(amounts: list[float], stocks: Sequence[str]) -> list[float]:
    if len(amounts) != len(stocks):
        raise InvalidAction(f"{len(amounts)} numbers for {len(stocks)} stocks. {legal_orders(stocks)}")
    return amounts


def _amount(token: str) -> float:
    number = NUMBER.fullmatch(token)
    assert number is not None
    value = float(number[1]) / (100.0 if number[2] else 1.0)
    return max(-1.0, min(1.0, value))
