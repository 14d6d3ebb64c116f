"""Daily closing prices, and the window of them for one episode.

The default is 20 stocks of the S&P 500, 1990-01-02 to 2022-12-28, adjusted closes, from the
data file that comes with skfolio 1.12.2 (BSD-3-Clause). These companies survived to the end, so holding them did better
than holding stocks picked in 1990 (survivorship bias).
"""

from __future__ import annotations

import importlib.util
import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import pandas as pd

from integrations.openenv.catalog.finrl_options import FinRLOptions

BUNDLED = Path("datasets") / "data" / "sp500_dataset.csv.gz"  # in the package skfolio, which is never imported
CSV_ENDINGS = (".csv", ".csv.gz")
TICKER_COLUMNS = ("ticker", "tic")  # FinRL says tic
RETURN = "return_"  # return_5 is the change over 5 days in percent; other indicators are columns of the user's file


@dataclass(frozen=True, slots=True)
class PriceTable:
    """One row per day (ISO date, ascending), one column per stock. NaN: no price on that day."""

    closes: pd.DataFrame
    columns: dict[str, pd.DataFrame]  # further columns of the file, by name

    @property
    def stocks(self) -> list[str]:
        return [str(stock) for stock in self.closes.columns]


@dataclass(frozen=True, slots=True)
class Window:
    """The prices and indicators of one episode, day by day. The first decision is taken on the first day."""

    stocks: tuple[str, ...]
    dates: tuple[str, ...]
    closes: tuple[tuple[float, ...], ...]  # [day][stock]
    indicators: tuple[tuple[float, ...], ...]  # [day][indicator * stocks + stock], from that day's and earlier prices


def price_table(path: str) -> PriceTable:
    """Return the prices in the user's file, or the bundled ones if the path is empty; ValueError if unusable."""
    if not path:
        return _bundled_table()
    if not path.endswith(CSV_ENDINGS):
        raise ValueError(f"prices={path!r} must be a file ending in {' or '.join(CSV_ENDINGS)}")
    if not os.path.isfile(path):
        raise ValueError(f"prices={path!r} is no file on the server's machine")
    return _table_of_file(path, os.stat(path).st_mtime_ns)


def draw_window(options: FinRLOptions, seed: int | None) -> Window:
    """Return the window of an episode. The seed draws the stocks and then the first day, unless they are given."""
    random = Random(seed)
    table = price_table(options.prices)
    stocks = _stocks(table, options, random)
    closes = table.closes[list(stocks)].dropna()  # the days on which each of them has a price
    dates = [str(date) for date in closes.index]
    start = _start(dates, options, random)
    end = start + (options.window or len(dates) - 1 - start) + 1
    back = lookback(options.indicators)
    seen = _indicators(table, closes.iloc[start - back : end], options.indicators)
    return Window(stocks, tuple(dates[start:end]), _rows(closes.iloc[start:end]), _rows(seen.iloc[back:]))


def lookback(indicators: Sequence[str]) -> int:
    """Return how many days before the first one the indicators need."""
    return max((_return_days(name) or 0 for name in indicators), default=0)


def _stocks(table: PriceTable, options: FinRLOptions, random: Random) -> tuple[str, ...]:
    there = table.stocks
    for stock in options.stocks:
        if stock not in there:
            raise ValueError(f"stocks: there are no prices of {stock!r}; there are {', '.join(there[:50])}")
    if options.num_stocks > len(there):
        raise ValueError(f"num_stocks={options.num_stocks}, but there are prices of {len(there)}")
    return options.stocks or tuple(random.sample(there, options.num_stocks))


def _start(dates: list[str], options: FinRLOptions, random: Random) -> int:
    """Return the first day's index.

    A window and its look-back lie completely within the period, so train and validation share no day.
    """
    days, split = options.window or 1, bisect_left(dates, options.split)
    low = 0 if options.period != "validation" else split
    end = len(dates) if options.period != "train" else split
    first, last = low + lookback(options.indicators), end - 1 - days
    if last < first:
        raise ValueError(
            f"window={options.window}: {days} days and {lookback(options.indicators)} before them do not fit into the "
            f"{max(end - low, 0)} days of the period {options.period!r} (split={options.split})"
        )
    if not options.start:
        return random.randint(first, last) if options.window else first
    start = bisect_left(dates, options.start)
    if not first <= start <= last:
        raise ValueError(
            f"start={options.start} must be from {dates[first]} to {dates[last]} for a window of {days} days "
            f"in the period {options.period!r}"
        )
    return start


def _indicators(table: PriceTable, closes: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    parts = [pd.DataFrame(index=closes.index)]
    for name in names:
        days = _return_days(name)
        if days is not None:
            parts.append(100.0 * (closes / closes.shift(days) - 1.0))
        elif name in table.columns:
            parts.append(table.columns[name].loc[closes.index, closes.columns].fillna(0.0))
        else:
            columns = ", ".join(table.columns) or "none"
            raise ValueError(
                f"indicators: {name!r} is neither return_DAYS nor a column of the prices (columns: {columns})"
            )
    return pd.concat(parts, axis="columns")


def _return_days(name: str) -> int | None:
    digits = name.removeprefix(RETURN)
    return int(digits) if name.startswith(RETURN) and digits.isdecimal() and 0 < len(digits) <= 4 else None


def _rows(frame: pd.DataFrame) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in frame.to_numpy(dtype=float))


@lru_cache(maxsize=1)
def _bundled_table() -> PriceTable:
    package = importlib.util.find_spec("skfolio")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "there are no prices: install the extra finrl-env (uv sync --extra finrl-env), or give prices="
        )
    closes = pd.read_csv(Path(package.submodule_search_locations[0]) / BUNDLED, index_col=0)
    return PriceTable(closes, {})


@lru_cache(maxsize=8)
def _table_of_file(path: str, modified_ns: int) -> PriceTable:
    """Read a file with a row per day and stock: date, ticker (or tic), close, and any further columns.

    `modified_ns` makes the cache miss when the file has changed.
    """
    try:
        frame = pd.read_csv(path)
    except (ValueError, OSError) as wrong:  # pandas' ParserError is a ValueError
        raise ValueError(f"prices={path!r} cannot be read as comma-separated values ({type(wrong).__name__})") from None
    ticker = next((name for name in TICKER_COLUMNS if name in frame.columns), None)
    if ticker is None or not {"date", "close"} <= set(frame.columns):
        raise ValueError(f"prices={path!r} must have the columns date, ticker and close")
    frame["date"] = pd.to_datetime(frame["date"], errors="coerce").dt.strftime("%Y-%m-%d")
    frame[ticker] = frame[ticker].astype(str)
    if frame["date"].isna().any() or frame.duplicated(["date", ticker]).any():
        raise ValueError(f"prices={path!r}: each row needs a date, and a ticker may have one row a day")
    numeric = [str(name) for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name])]
    tables = {name: frame.pivot(index="date", columns=ticker, values=name).sort_index() for name in numeric}
    closes = tables.pop("close", None)
    if closes is None or not all(0 < price < math.inf for price in frame["close"].dropna()):
        raise ValueError(f"prices={path!r}: every close must be a positive number")
    return PriceTable(closes, tables)
