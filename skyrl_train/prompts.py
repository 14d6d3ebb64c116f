"""The data set: rows of files or hub data sets become prompts, and a schedule says which of them each step plays."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
from jinja2 import TemplateError
from loguru import logger
from tqdm import tqdm

from skyrl_gym.contract import WrongAnswer, checked_messages
from skyrl_train.config.problems import Unfit
from skyrl_train.files import user_path
from skyrl_train.rollout.env_calls import MISTAKES
from skyrl_train.types import Message, Prompt
from skyrl_train.visible import words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
FILE_TYPES = (".parquet", ".json", ".jsonl")
SECONDS_BEFORE_PROGRESS_BAR = 2.0


class DataError(Unfit):
    """A data set that cannot be used, with the reason."""


class PromptRows(Sequence[Prompt]):
    """The rows of all sources in order, without those whose prompt is too long.

    sources: .parquet, .json or .jsonl files, or names on the hub as name[:split] (split "train" if left out). A row
    has a `prompt_column` (a list of {role, content}, or the text of one message), perhaps `env_class`, `max_turns` and
    `seed`, and any other columns, which the environment gets. In these four null is the same as not given.
    The length of a prompt is counted in tokens of the chat template, generation prompt included; `template_kwargs`
    are further arguments of apply_chat_template (`generator.chat_template_kwargs`, or a `chat_template`). A prompt's
    uid is its position among the rows that were kept. `look_up` raises for an env_class that is no environment; it is
    called once for each, before the tokens are counted.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        default_env_class: str,
        template_kwargs: Mapping[str, Any] | None = None,
        look_up: Callable[[str], Any] | None = None,
        prompt_column: str = "prompt",
    ) -> None:
        rows = [(place, row) for source in sources for place, row in read_source(source)]
        names = ", ".join(sources)
        if tokenizer.chat_template is None and not (template_kwargs or {}).get("chat_template"):
            raise DataError("the model's tokenizer has no chat template; take an instruct model, or give a template")
        if not rows:
            raise DataError(f"no rows in {names or 'an empty list of sources'}")
        prompts = [(place, row_prompt(place, row, default_env_class, prompt_column)) for place, row in rows]
        if look_up is not None:
            refuse_unknown_environments(prompts, look_up)
        self._prompts: list[Prompt] = []
        dropped_lengths: list[int] = []
        for place, prompt in tqdm(
            prompts, desc="counting prompt tokens", unit="rows", delay=SECONDS_BEFORE_PROGRESS_BAR
        ):
            length = templated_length(tokenizer, prompt.messages, template_kwargs or {}, place)
            if length <= max_prompt_length:
                self._prompts.append(replace(prompt, uid=str(len(self._prompts))))
            else:
                dropped_lengths.append(length)
        self.num_dropped = len(rows) - len(self._prompts)
        if not self._prompts:
            shortest, longest = min(dropped_lengths), max(dropped_lengths)
            raise DataError(
                f"all {len(rows)} prompts of {names} are too long: they have {shortest} to {longest} tokens, "
                f"trainer.max_prompt_length={max_prompt_length}",
                f"trainer.max_prompt_length={longest}",
            )
        dropped = f", {self.num_dropped} dropped (longer than {max_prompt_length} tokens)" if self.num_dropped else ""
        logger.log("WARNING" if dropped else "INFO", f"{len(self._prompts)} prompts from {names}{dropped}")

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return self._prompts[index]

    def batches(self, size: int) -> Iterator[list[Prompt]]:
        """Return all prompts in order, `size` at a time; the last batch may be smaller."""
        return (self._prompts[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True, slots=True)
class PromptSchedule:
    """The rows of each step. Steps count from 1; a run that has done N steps goes on with batch(N + 1).

    The order of an epoch depends on the seed and the epoch alone, so nothing else has to be stored. Every epoch leaves
    out the `num_left_out` rows behind its last whole batch, different ones each time.
    """

    num_rows: int
    batch_size: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs < 1:
            raise ValueError(f"batch_size={self.batch_size} and epochs={self.epochs} must be at least 1")
        if self.num_rows < self.batch_size:
            raise DataError(
                f"a step takes trainer.train_batch_size={self.batch_size} prompts, but the data set has "
                f"{self.num_rows}; use trainer.train_batch_size={self.num_rows} or less, or more data",
                f"trainer.train_batch_size={self.num_rows}",
                f"trainer.policy_mini_batch_size={self.num_rows}",
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def num_left_out(self) -> int:
        return self.num_rows % self.batch_size

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, counted from 0. Dynamic sampling goes on into further epochs."""
        if step < 1:
            raise ValueError(f"step {step}: steps count from 1")
        return (step - 1) // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Return the rows of one step."""
        order = epoch_order(self.num_rows, self.seed, self.epoch(step))
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        return list(order[start : start + self.batch_size])


class TrainPrompts:
    """The prompts of each training step."""

    def __init__(self, dataset: PromptRows, schedule: PromptSchedule) -> None:
        if len(dataset) != schedule.num_rows:
            raise ValueError(f"the schedule is for {schedule.num_rows} rows, the data set has {len(dataset)}")
        self.dataset, self.schedule = dataset, schedule
        left_out = schedule.num_left_out
        logger.info(
            f"{schedule.num_steps} steps of {schedule.batch_size} prompts: {schedule.steps_per_epoch} per epoch"
            + (f", which leaves out {left_out} of {len(dataset)} prompts, others in each epoch" if left_out else "")
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Return how many rows are never played, and how many each epoch leaves out behind its last whole batch."""
        return {
            "data/num_dropped_prompts": float(self.dataset.num_dropped),
            "data/num_left_out_prompts": float(self.schedule.num_left_out),
        }

    def take(self, step: int) -> list[Prompt]:
        """Return the prompts of a step; steps count from 1. With dynamic sampling a step may take those of several."""
        return [self.dataset[row] for row in self.schedule.batch(step)]


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"prompt order, seed {seed}, epoch {epoch}").shuffle(order)
    return tuple(order)


def read_source(source: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of one source, each with its place in the source for messages. All values are plain Python."""
    path = user_path(source)
    if path.suffix in FILE_TYPES:
        if not path.is_file():
            raise DataError(f"there is no file {path} (given in data.train_data, data.val_data or trainer.sft.data)")
        rows = parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    elif path.exists():
        raise DataError(f"{path} is not a {', '.join(FILE_TYPES)} file; name the file itself, or convert it")
    else:
        rows = hub_rows(source)
    yield from ((f"row {index} of {source}", row) for index, row in enumerate(rows))


def parquet_rows(path: Path) -> list[Row]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # OSError: pages that are cut or do not decompress
        raise DataError(f"{path} is not a readable parquet file: {_one_line(error)}; write or copy it again") from error


def json_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON array or of one object per line, in UTF-8 with or without a byte order mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not written in UTF-8 ({error}): convert it, or write it again") from error
    if text.lstrip().startswith("["):
        return _json(text, str(path))
    lines = enumerate(text.split("\n"), start=1)
    return [_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is neither a JSON array nor one JSON object per line: {error}") from error


def hub_rows(source: str) -> Iterator[Row]:
    from datasets import load_dataset  # takes a second to import, and only hub names need it

    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        known = ", ".join(FILE_TYPES)
        raise DataError(f"{source!r} is no {known} file, and as a hub data set it fails: {error}") from error
    yield from (dict(row) for row in rows)


def row_messages(place: str, row: Row, column: str = "prompt") -> list[Message]:
    """Return the checked messages of a row's prompt; a text is one message of the user."""
    if not isinstance(row, dict) or column not in row:
        found = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        hint = "; data.prompt_column names another" if isinstance(row, dict) else ""
        raise DataError(f'{place} has no column "{column}"; it has {found}{hint}')
    messages = row[column]
    if isinstance(messages, str) and messages.strip():
        messages = [{"role": "user", "content": messages}]
    return checked_conversation(place, column, messages)


def checked_conversation(place: str, column: str, messages: Any) -> list[Message]:
    """Return checked messages. DataError names the row and the column that holds something else."""
    is_list = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not is_list or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        wanted = 'a text, or a list of messages [{"role": "user", "content": "..."}, ...]'
        raise DataError(f"{place}: {column} must be {wanted}, got {str(messages)[:80]!r}")
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return checked_messages(plain)
    except WrongAnswer as wrong:  # half a surrogate pair, a nested value that is no JSON
        raise DataError(f"{place}: {column}: {wrong}") from None


def row_prompt(place: str, row: Row, default_env_class: str, prompt_column: str = "prompt") -> Prompt:
    """Return the row as a prompt that has no uid yet. A prompt column of another name stays among the extras."""
    messages = row_messages(place, row, prompt_column)
    given = None if _is_null(row.get("env_class")) else row["env_class"]
    env_class = given or default_env_class
    if not isinstance(env_class, str):
        raise DataError(f"{place}: env_class must be the name of an environment, got {env_class!r}")
    extras = {key: value for key, value in row.items() if key not in ("prompt", "env_class", "max_turns", "seed")}
    for column, least in (("max_turns", 1), ("seed", None)):
        if not _is_null(row.get(column)):
            extras[column] = _whole_number(place, column, row[column], least)
    return Prompt(uid="", messages=messages, env_class=env_class, env_extras=extras)


def refuse_unknown_environments(prompts: Sequence[tuple[str, Prompt]], look_up: Callable[[str], Any]) -> None:
    """Look up every env_class once. DataError names those that are no environment, with their first rows."""
    first_places: dict[str, str] = {}
    for place, prompt in prompts:
        first_places.setdefault(prompt.env_class, place)
    wrong = []
    for env_class, place in first_places.items():
        try:
            look_up(env_class)
        except (*MISTAKES, OSError, RuntimeError, ValueError) as error:
            wrong.append(f"{place}: env_class={env_class!r}: {words_of(error, with_place=False)}")
    if wrong:
        raise DataError("; ".join(wrong))


def _whole_number(place: str, column: str, value: Any, least: int | None) -> int:
    """Return a whole number; 3.0 counts, as pandas writes a number column with nulls as floats."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int):
        raise DataError(f"{place}: {column} must be a whole number or null, got {str(value)[:80]!r}")
    if least is not None and whole < least:
        raise DataError(f"{place}: {column}={whole} must be at least {least}")
    return whole


def _is_null(value: Any) -> bool:
    """Return whether the value is None, or NaN, which pandas writes for None among numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def templated_length(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], template_kwargs: Mapping[str, Any], place: str
) -> int:
    """Return the number of tokens of the prompt as the model will read it."""
    try:
        token_ids = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False, **template_kwargs
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{place}: the chat template refuses the prompt: {error}") from error
    return len(token_ids)
