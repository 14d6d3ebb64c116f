"""Token ids are those of tokenizer.encode, bit for bit, whoever used the tokenizer before."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from skyrl_train.rollout.encoding import NUM_RECENT, Encoder
from tests.real_templates import byte_tokenizer, llama3_tokenizer, qwen_tokenizer, space_tokenizer
from tests.tiny_models import tiny_tokenizer

TOKENIZERS = [
    tiny_tokenizer(),
    qwen_tokenizer(),
    llama3_tokenizer(),
    byte_tokenizer("", ["<|im_end|>"]),
    space_tokenizer("", ["<|im_end|>"], "before every piece"),
]
PIECES = st.sampled_from(["<|im_end|>", "<|eot_id|>", "\n", " ", "  a", "é", "\x00", "ab", "<|", "|>"])
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=5))).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_short_way_gives_the_ids_of_the_long_one(tokenizer, text):
    encoder = Encoder(tokenizer)
    assert encoder._rust is not None
    expected = tokenizer.encode(text, add_special_tokens=False)
    encoder.again(text).append(-1)  # the caller's own list
    assert encoder(text) == encoder.again(text) == expected


def test_what_other_calls_left_in_the_tokenizer_does_not_matter():
    tokenizer = tiny_tokenizer()
    encoder, text = Encoder(tokenizer), "<|im_end|> a few words"
    expected = tokenizer.encode(text, add_special_tokens=False)
    tokenizer(text, truncation=True, max_length=3)
    assert encoder(text) == expected
    tokenizer(text, padding="max_length", max_length=100)
    assert encoder(text) == expected
    tokenizer(text, split_special_tokens=True)
    assert encoder(text) == expected
    assert encoder.again(text) == expected
    tokenizer.split_special_tokens = True
    assert encoder.again(text) == encoder(text) == tokenizer.encode(text, add_special_tokens=False) != expected


def test_a_tokenizer_with_an_encode_of_its_own_is_asked_itself():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["add_special_tokens"] = False
            return super()._encode_plus("other words", **kwargs)

    own = tiny_tokenizer()
    own.__class__ = Own
    assert Encoder(own)("a") == own.encode("a") == tiny_tokenizer().encode("other words")
    patched = tiny_tokenizer()
    patched.encode = lambda text, **kwargs: [1]
    assert Encoder(patched)("a") == [1]


def test_texts_that_are_kept_are_few():
    encoder = Encoder(tiny_tokenizer())
    for number in range(3 * NUM_RECENT):
        assert encoder.again(str(number)) == encoder(str(number))
    assert len(encoder._recent) == NUM_RECENT
