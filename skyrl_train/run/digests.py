"""Digests of a run's inputs and checkpoints: XXH3, 128 bits, about 10 GB/s on one core.

They find damage and mix-ups. They are no signatures: whoever can write a file can write its digest.
"""

from __future__ import annotations

import re
from pathlib import Path

from xxhash import xxh3_128

from skyrl_train.files import naming

DIGESTS = "digests.txt"  # as `xxh128sum` writes and checks them, below a line that names the format
_CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{32})  (.+)")


class Damaged(ValueError):
    """A file that is not what was written; the message begins with its path."""


def text_digest(text: str) -> str:
    return xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    digest, chunk = xxh3_128(), memoryview(bytearray(_CHUNK))
    with naming(path), path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def write_digests(folder: Path, header: str) -> None:
    """Write `digests.txt`: the header, then the digest of every file in the folder and below."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [header, *(f"{file_digest(folder / name)}  {name}" for name in names)]
    with naming(folder / DIGESTS):
        (folder / DIGESTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_digests(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the header of `digests.txt`, and name -> digest. Raises Damaged if the file is missing or damaged."""
    path = folder / DIGESTS
    try:
        header, *lines, rest = path.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except ValueError as error:  # bytes that are no UTF-8, or not a single whole line
        raise Damaged(f"{path} is damaged") from error
    found = [_LINE.fullmatch(line) for line in lines]
    digests = {match[2]: match[1] for match in found if match}
    if rest or len(digests) != len(lines):
        raise Damaged(f"{path} is damaged or cut short")
    return header, digests


def check_digests(folder: Path, digests: dict[str, str], suffix: str) -> None:
    """Raise Damaged unless the listed files are all there as they were written, and no other file has the suffix."""
    for name, written in digests.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if file_digest(path) != written:
            raise Damaged(f"{path} is damaged or cut short: its digest is not the one in {DIGESTS}")
    for path in sorted(folder.rglob(f"*{suffix}")):
        if path.relative_to(folder).as_posix() not in digests:
            raise Damaged(f"{path} is not listed in {DIGESTS}, so one of the two is damaged")
