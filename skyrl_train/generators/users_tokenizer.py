"""The tokenizer as code written for SkyRL calls it: a chat template's tokens are a list."""

from __future__ import annotations

import copy
from typing import Any


def users_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer whose `apply_chat_template` returns a list of ids where tokens are asked for.

    transformers 5 returns a mapping unless told otherwise, of which code for transformers 4 takes the length.
    """
    made = copy.copy(tokenizer)
    made.__class__ = type(type(tokenizer).__name__, (type(tokenizer),), {"apply_chat_template": _apply_chat_template})
    return made


def _apply_chat_template(self: Any, conversation: Any, *args: Any, return_dict: bool = False, **kwargs: Any) -> Any:
    return type(self).__mro__[1].apply_chat_template(self, conversation, *args, return_dict=return_dict, **kwargs)
