"""The end of a response by its text: finds stop strings that may span tokens, decoding only when one can have ended."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Looks only at the end of the response, and only when the newest token holds the last letter of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}  # token -> its text alone

    def ended(self, response_ids: list[int], stop: tuple[str, ...]) -> bool:
        """Return whether a stop string ends within the last token of the response."""
        piece = self._piece(response_ids[-1])
        for string in stop:
            if string and (string[-1] in piece or "\ufffd" in piece):  # \ufffd: part of a letter of several bytes
                window = response_ids[-(len(string.encode()) + 4) :]
                at = self._decode(window).rfind(string)
                if at >= 0 and at + len(string) > len(self._decode(window[:-1]).rstrip("\ufffd")):
                    return True
        return False

    def _piece(self, token: int) -> str:
        if (piece := self._pieces.get(token)) is None:
            piece = self._pieces[token] = self._decode([token])
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
