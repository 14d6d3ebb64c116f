"""Text to token ids as tokenizer.encode does it, without what Transformers wraps around the call into Rust."""

from __future__ import annotations

from typing import Any

# The modules in which Transformers defines these of its Rust tokenizers. A tokenizer with its own is asked itself.
_OF_TRANSFORMERS = {
    "encode": "transformers.tokenization_utils_base",
    "_encode_plus": "transformers.tokenization_utils_tokenizers",
}
NUM_RECENT = 128  # texts whose ids are kept


class Encoder:
    """Calls of `tokenizer.encode(text, add_special_tokens=False)`, at half the cost where the tokenizer is plain."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        is_plain = all(_defined_in(tokenizer, name) == module for name, module in _OF_TRANSFORMERS.items())
        self._recent: dict[tuple[str, bool | None], list[int]] = {}
        self._rust = tokenizer.backend_tokenizer if is_plain else None

    def again(self, text: str) -> list[int]:
        """Encode a text that was probably encoded a moment ago, such as the prompt of a group's other episodes."""
        key = text, self._tokenizer.split_special_tokens if self._rust is not None else None
        ids = self._recent.get(key)
        if ids is None:
            if len(self._recent) == NUM_RECENT:
                del self._recent[next(iter(self._recent))]
            ids = self._recent[key] = self(text)
        return ids.copy()

    def __call__(self, text: str) -> list[int]:
        rust = self._rust
        if (
            rust is None
            or rust.truncation is not None  # another call has left these; `encode` takes them back
            or rust.padding is not None
            or rust.encode_special_tokens != self._tokenizer.split_special_tokens
        ):
            return self._tokenizer.encode(text, add_special_tokens=False)
        return rust.encode_batch_fast([text], add_special_tokens=False)[0].ids  # without places in the text


def _defined_in(tokenizer: Any, name: str) -> str | None:
    """Return the module of the class that defines a method; None if there is none, or if it is the object's own."""
    if name in vars(tokenizer):
        return None
    return next((kind.__module__ for kind in type(tokenizer).__mro__ if name in vars(kind)), None)
