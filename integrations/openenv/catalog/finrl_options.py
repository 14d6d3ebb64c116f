"""The options of a trading episode in finrl_env, shared by the catalog and the server."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date
from typing import Literal

MAX_STOCKS = 50
# The stocks of the bundled prices: dataset rows name theirs without opening the prices.
SP500_STOCKS = (
    *("AAPL", "AMD", "BAC", "BBY", "CVX", "GE", "HD", "JNJ", "JPM", "KO"),
    *("LLY", "MRK", "MSFT", "PEP", "PFE", "PG", "RRC", "UNH", "WMT", "XOM"),
)
BOUNDS: dict[str, tuple[float, float]] = {
    "num_stocks": (1, MAX_STOCKS),
    "window": (0, 100_000),
    "days_per_action": (1, 10_000),
    "cash": (1, 1e12),
    "shares": (0, 10**9),
    "hmax": (0, 10**9),
    "buy_cost_pct": (0, 0.5),
    "sell_cost_pct": (0, 0.5),
    "reward_scaling": (1e-12, 1e6),
}
TICKER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]{0,11}")


@dataclass(frozen=True, slots=True)
class FinRLOptions:
    """The stocks, the days and the rules of a trading episode."""

    stocks: tuple[str, ...] = ()  # tickers; none: `num_stocks` are drawn for each task
    num_stocks: int = 2
    prices: str = (
        ""  # csv file on the server's machine: date, ticker, close, ...; none: 20 of the S&P 500, 1990 to 2022
    )
    period: Literal["all", "train", "validation"] = "all"  # train ends before `split`, validation starts there
    split: str = "2015-01-01"
    start: str = ""  # first day; none: drawn. With it both splits of a data set play the same days
    window: int = 160  # trading days of an episode; 0: to the end of the prices
    days_per_action: int = 20  # trading days that pass after each decision
    cash: float = 10_000.0  # in dollars, at the beginning
    shares: int | tuple[int, ...] = 0  # of each stock, at the beginning
    hmax: int = 0  # shares that an action of 1 trades; 0: as many as an equal part of the initial cash buys
    buy_cost_pct: float | tuple[float, ...] = 0.001  # fraction of what is bought; FinRL's name
    sell_cost_pct: float | tuple[float, ...] = 0.001
    reward_scaling: float = 1e-4  # dollars to reward, in the server's own reward
    indicators: tuple[str, ...] = ("return_1", "return_5", "return_20")  # return_DAYS in percent, or a column of prices
    shaped_reward: bool = True  # how much better than buying and holding, see FinRLTranslator; else the server's own

    def __post_init__(self) -> None:
        known = self.stocks or ("A",)
        if len(known) > MAX_STOCKS or len(set(known)) < len(known) or not all(map(TICKER.fullmatch, known)):
            raise ValueError(f"stocks={list(self.stocks)[:60]} must be at most {MAX_STOCKS} different tickers")
        for name, day in (("split", self.split), ("start", self.start)):
            try:
                date.fromisoformat(day or "2000-01-01")
            except ValueError:
                raise ValueError(f"{name}={day!r} must be a day like 2010-01-31") from None
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not all(low <= part <= high for part in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name}={value} must be from {low} to {high}")

    @property
    def num_decisions(self) -> int:
        """The number of decisions in an episode; 0 if it goes on to the end of the prices."""
        return math.ceil(self.window / self.days_per_action)
