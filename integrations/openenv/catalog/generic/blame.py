"""Decision whether a server's error was caused by the action that it was sent or by a fault of the server.

OpenEnv's servers send an exception's message without its type, and send VALIDATION_ERROR also if an object that they
built themselves does not validate. So the message and the action must be compared:

VALIDATION_ERROR   the action, if the complaint is about something that was sent
EXECUTION_ERROR    the server, if the message is that of a programming error or of a machine that lacks something;
                   but the action, if the error could come from what was sent: a key or an index in it
all others         the server
"""

from __future__ import annotations

import json
import re
from typing import Any

from integrations.openenv.client.errors import ServerError

# Messages of Python for mistakes in a program, and for files and machines that do not exist.
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
    r"|\breset\(\)"  # "call reset() first", which we did
)
# Messages for a failed look-up (the key as it is written), and for an index or a divisor.
KEY = re.compile(r"""'([^']*)'|"([^"]*)"|-?\d+(?:\.\d+)?|None|\(.*\)""", re.DOTALL)
INDEX = re.compile(r"index out of (range|bounds)|division (or modulo )?by zero|is out of bounds for")


def caused_by_action(error: ServerError, sent: dict[str, Any], field_names: set[str]) -> bool:
    """Return whether the action caused the error. `field_names`: those in the schema of actions."""
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
    """Return whether a complaint of pydantic, which names the field and shows its value, is about what was sent."""
    where = complaint.get("loc") or ()
    if not where:
        return True
    name = where[0]
    if name in sent and len(where) == 1 and "input" in complaint and complaint.get("type") != "missing":
        return complaint["input"] == sent[name]
    return name in sent or name in field_names


def _is_loose(sent: dict[str, Any]) -> bool:
    """Return whether the action has nested parts without a schema, which can cause any error in a program."""
    return "tool_name" not in sent and any(isinstance(value, dict | list) and value for value in sent.values())
