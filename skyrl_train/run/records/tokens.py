"""The text of single tokens, also where one character is spread over several of them."""

from __future__ import annotations

import codecs
import json
from typing import Any

from tokenizers import decoders


class TokenTexts:
    """Turns token ids into one string per token, whose concatenation is the text. Each id is looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of transformers."""
        self.tokenizer = tokenizer
        self.known: dict[int, bytes] = {}
        self.special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kinds = _decoder_kinds(json.loads(backend.to_str())["decoder"]) if backend is not None else set()
        self.alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self.piece_decoder = decoders.Sequence([decoders.Replace("▁", " ")]) if "ByteFallback" in kinds else None

    def __call__(self, ids: list[int]) -> list[str]:
        """Return the strings; a character made of several tokens stands at the last of them, the others hold "".

        "é" as [195, 169] -> ["", "é"]. Bytes that never become a character turn into "\\ufffd".
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = [decoder.decode(self.bytes_of(token)) for token in ids]
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts

    def bytes_of(self, token: int) -> bytes:
        if token not in self.known:
            self.known[token] = self._bytes_of(token)
        return self.known[token]

    def _bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<id {token}>".encode()
        if token in self.special:
            return piece.encode(errors="replace")
        if self.alphabet is not None and all(character in self.alphabet for character in piece):
            return bytes(self.alphabet[character] for character in piece)
        if self.piece_decoder is not None:
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes.fromhex(piece[3:5])
            return self.piece_decoder.decode([piece]).encode(errors="replace")
        return self.tokenizer.decode([token], skip_special_tokens=False).encode(errors="replace")


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """Return the types of a tokenizer.json's decoder and of the decoders in it."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(inner) for inner in decoder.get("decoders", [])))


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's characters for bytes: printable Latin-1 stands for itself, the others are U+0100, U+0101, ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
