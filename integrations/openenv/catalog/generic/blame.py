"""Whose doing a server's error is: that of the action it was sent, or its own.

OpenEnv's servers tell of an exception by its words only, without its type, and send VALIDATION_ERROR also where what
they build themselves does not validate. So the words and the action have to say it:

VALIDATION_ERROR   the action's, if what is complained about was sent
EXECUTION_ERROR    the server's, if the words are those of a programming error or of a machine that lacks something;
                   but the action's, if that could have come from what was sent: a key or an index that it names
all others         the server's
"""

from __future__ import annotations

import json
import re
from typing import Any

from integrations.openenv.client.errors import ServerError

# What Python says of a mistake in a program, and of files and machines that are not there.
PROGRAMMING_ERROR = re.compile(
    r"has no attribute '|^name '.*' is not defined|cannot access (local|free) variable|referenced before assignment"
    r"|No module named |cannot import name |not JSON serializable|Unable to serialize|maximum recursion depth"
    r"|^\[Errno |\[WinError |out of memory|Cannot allocate memory|Connection (refused|reset|aborted)"
    r"|Max retries exceeded|Name or service not known|Event loop is closed|was never awaited"
    r"|object is not (subscriptable|callable|iterable|an iterator|a mapping)|object is not an? async"
    r"|unsupported operand type|bad operand type|not supported between instances of|can only concatenate"
    r"|missing \d+ required (positional|keyword-only) argument|got an unexpected keyword argument"
    r"|takes (no|\d+|from \d+ to \d+) (positional )?arguments? (but|\()|got multiple values for argument"
    r"|object cannot be interpreted as an integer|indices must be integers|object does not support item"
    r"|not enough values to unpack|too many values to unpack|cannot unpack non-iterable|unhashable type"
    r"|argument of type '.*' is not iterable|expected str, bytes or os.PathLike|must be str, not "
    r"|\breset\(\)"  # "call reset() first": we did
)
# What it says of a look-up in vain: a key as it is written, or an index or a divisor.
KEY = re.compile(r"""'([^']*)'|"([^"]*)"|-?\d+(?:\.\d+)?|None|\(.*\)""", re.DOTALL)
INDEX = re.compile(r"index out of (range|bounds)|division (or modulo )?by zero|is out of bounds for")


def caused_by_action(error: ServerError, sent: dict[str, Any], field_names: set[str]) -> bool:
    """Whether the error is the doing of the action that was sent; `field_names`: of the schema of actions."""
    if error.code == "VALIDATION_ERROR":
        complaints = [detail for detail in error.details if isinstance(detail, dict)]
        return not complaints or any(_is_about(complaint, sent, field_names) for complaint in complaints)
    if error.code != "EXECUTION_ERROR":
        return False
    words = error.message.strip()
    if KEY.fullmatch(words):
        return words.strip("'\"").lower() in json.dumps(sent, ensure_ascii=False).lower()
    if INDEX.search(words):
        return any(character.isdigit() for character in json.dumps(sent))
    return not PROGRAMMING_ERROR.search(words) or _is_loose(sent)


def _is_about(complaint: dict[str, Any], sent: dict[str, Any], field_names: set[str]) -> bool:
    """Pydantic names the field and shows the value that it complains about."""
    where = complaint.get("loc") or ()
    if not where:
        return True
    name = where[0]
    if name in sent and len(where) == 1 and "input" in complaint and complaint.get("type") != "missing":
        return complaint["input"] == sent[name]
    return name in sent or name in field_names


def _is_loose(sent: dict[str, Any]) -> bool:
    """Whether the action has parts whose form no schema says, so that a program may stumble over them."""
    return "tool_name" not in sent and any(isinstance(value, dict | list) and value for value in sent.values())
