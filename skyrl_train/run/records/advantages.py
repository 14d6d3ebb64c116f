"""The advantages of a step's tokens, kept beside its episodes: trajectories/advantages_step_000001.jsonl.zst.

One line per sample. Neighbouring tokens with the same value are written once with their number, so that GRPO's, which
are equal within an episode, take a few bytes:

{"id": "7_0", "num_tokens": 6, "trained": [[0, 2], [1, 2], [0, 1], [1, 1]], "advantages": [[0.5, 3]]}
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import zstandard

from skyrl_train.files import write_whole
from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.run.run_folder import TRAJECTORIES
from skyrl_train.types import Batch

Row = list[tuple[bool, float | None]]  # of each token: is it trained, and its advantage if so


def advantages_path(run_folder: Path, step: int) -> Path:
    return run_folder / TRAJECTORIES / f"advantages_step_{step:06d}.jsonl.zst"


def write_advantages(path: Path, trajectory_ids: list[str], batch: Batch) -> None:
    """Write the advantages of a batch; trajectory_ids: of each sample."""
    if batch.advantages is None:
        return
    advantages, trained, offsets = batch.advantages.tolist(), batch.loss_mask.tolist(), batch.offsets.tolist()
    lines = []
    for number, name in enumerate(trajectory_ids):
        tokens = range(offsets[number], offsets[number + 1])
        line = {
            "id": name,
            "num_tokens": len(tokens),
            "trained": _runs(int(trained[t]) for t in tokens),
            "advantages": _runs(float(f"{advantages[t]:.6g}") for t in tokens if trained[t]),
        }
        lines.append(json.dumps(line, separators=(",", ":")))
    text = "".join(f"{line}\n" for line in lines)
    write_whole(path, zstandard.ZstdCompressor(level=3, write_checksum=True).compress(text.encode()))


def read_advantages(path: Path, episode: EpisodeRecord) -> list[Row | None]:
    """Return a row per segment of the episode, None where nothing is known of it.

    A segment that begins a new history begins a new sample; rows without a sampled token gave none. ValueError if the
    file is damaged.
    """
    samples = list(_samples_of(path, f"{episode.uid}_{episode.repetition}"))
    found: list[Row | None] = [None] * len(episode.segments)
    for places in _rows_of(episode):
        if not any(episode.segments[place].sampled for place in places):
            continue
        sample = samples.pop(0) if samples else None
        lengths = [len(episode.segments[place].ids) for place in places]
        if sample is None or len(sample) != sum(lengths):
            continue
        for place, length in zip(places, lengths, strict=True):
            found[place], sample = sample[:length], sample[length:]
    return found


def _rows_of(episode: EpisodeRecord) -> Iterator[list[int]]:
    row: list[int] = []
    for place, segment in enumerate(episode.segments):
        if segment.new_history and row:
            yield row
            row = []
        row.append(place)
    if row:
        yield row


def _samples_of(path: Path, name: str) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            for line in io.TextIOWrapper(reader, encoding="utf-8"):
                values = json.loads(line)
                if values["id"] == name:
                    yield _expanded(values)
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, the episodes can still be read") from error


def _expanded(values: dict[str, Any]) -> Row:
    length = min(int(values["num_tokens"]), 10_000_000)
    if sum(count for _, count in values["trained"]) != length:
        raise ValueError(f"{values['id']}: {values['trained']} are not {length} tokens")
    trained = [bool(value) for value, count in values["trained"] for _ in range(count)]
    advantages = iter([float(value) for value, count in values["advantages"] for _ in range(count)])
    return [(is_trained, next(advantages) if is_trained else None) for is_trained in trained]


def _runs(values: Iterable[float]) -> list[list[float]]:
    """[0.5, 0.5, 1] -> [[0.5, 2], [1, 1]]"""
    return [[value, sum(1 for _ in members)] for value, members in groupby(values)]
