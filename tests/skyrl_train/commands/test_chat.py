"""`skyrl chat`: lines in, replies out, token for token what the engine says; and what a RUN|MODEL may be."""

from __future__ import annotations

import asyncio
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from skyrl_train.commands.main import main
from skyrl_train.commands.sources import source
from skyrl_train.commands.streaming import streamed
from skyrl_train.commands.trained import Talker
from skyrl_train.engine.base import Completion, Engine, Request, SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.visible import visible
from tests.tiny_models import tiny_tokenizer

CPU = ["trainer.device=cpu", "trainer.bf16=false"]
SAMPLING = SamplingParams(max_tokens=21, temperature=1.0, seed=7)


def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *words: str) -> list[str]:
    """Return the lines that the command prints."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", *words, *CPU, "--max-tokens", "12", "--temperature", "1"]) == 0
    return capsys.readouterr().out.replace("\n\n", "\n").splitlines()


async def replies(talker: Talker, lines: list[str]) -> list[str]:
    """Return the replies of a conversation, asked of the engine in whole requests."""
    engine = await talker.start()
    texts: list[str] = []
    chat = talker.chat_template.start([{"role": "user", "content": lines[0]}])
    for next_line in [*lines[1:], ""]:
        sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=0)
        done = await engine.generate(Request(chat.ids, sampling, "a"))
        texts.append(done.text)
        chat.append(done.response_ids, [{"role": "user", "content": next_line}])
    await engine.close()
    return texts


async def test_a_streamed_reply_has_the_tokens_of_a_whole_request(run):
    talker = Talker(source(str(run)), CPU)
    engine = await talker.start()
    ids = talker.chat_template.start([{"role": "user", "content": "hello"}]).ids
    for num_tokens in (1, 4, 21):
        sampling = replace(SAMPLING, max_tokens=num_tokens)
        whole = await engine.generate(Request(ids, sampling, "whole"))
        pieces = [piece async for piece in streamed(engine, talker.chat_template, ids, sampling, "streamed")]
        assert pieces[-1].ids == whole.response_ids
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    await engine.close()


class Speller:
    """An engine that says one text whatever it reads: as many of its tokens as are asked for, from where it stopped."""

    max_model_len = 100

    def __init__(self, text: str) -> None:
        self.ids = list(tiny_tokenizer().encode(text))

    async def generate(self, request: Request) -> Completion:
        begun = len(request.prompt_ids) - 1
        ids = self.ids[begun : begun + request.sampling.max_tokens]
        return Completion("", ids, [0.0] * len(ids), "length", 0)


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [((), ["abc☃ x", "yz. ", "more"]), (("xyz",), ["abc☃ x", "yz. "])],
)
async def test_no_letter_is_cut_and_a_stop_string_across_two_pieces_ends_the_reply(stop, pieces):
    engine, template = Speller("abc☃ xyz. more"), ChatTemplate(tiny_tokenizer())  # a snowman is three tokens
    sampling = SamplingParams(max_tokens=16, stop=stop)
    said = [piece async for piece in streamed(cast(Engine, engine), template, [0], sampling, "a")]
    assert [piece.text for piece in said] == pieces
    assert [piece.is_last for piece in said] == [False] * (len(pieces) - 1) + [True]


def test_a_conversation_goes_on_until_it_is_reset_and_nothing_steers_the_terminal(runs, capsys, monkeypatch):
    run = str(runs["full"])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\n/reset\none\n/quit\nthree\n"))
    assert main(["chat", run, *CPU, "--max-tokens", "12", "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    first, second = asyncio.run(replies(Talker(source(run), CPU), ["one", "two"]))
    assert out == "".join(visible(text) + "\n" for text in (first, second, first))
    assert all(letter.isprintable() or letter in "\n\t" for letter in out)


def test_the_model_before_the_run_answers_otherwise_and_is_the_base(runs, capsys, monkeypatch):
    run = str(runs["lora"])
    words = ([run], [run, "--before"], [str(runs["lora"].parent / "model")], [run, "--step", "1"])
    after, before, base, step_1 = (chat(capsys, monkeypatch, "hello\n", *named) for named in words)
    assert before == base
    assert len({tuple(after), tuple(before), tuple(step_1)}) == 3


def test_a_run_whose_checkpoints_were_deleted_answers_with_its_model(runs, tmp_path, capsys, monkeypatch):
    run = runs["full"]
    (tmp_path / "run").mkdir()
    shutil.copytree(run / "model", tmp_path / "run" / "model")
    found = source(str(tmp_path / "run"))
    assert (found.step, found.saved, found.model) == (2, None, str(tmp_path / "run" / "model"))
    assert found.settings["environment.env_class"] == "even_commands"
    assert source(str(run / "model"), before=True).model == str(run.parent / "model")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["./nowhere"], "there is no such folder"),
        (["."], ". is no run: it holds no checkpoint"),
        (["base", "--before"], "base is no run, so there is nothing before it"),
        (["base", "--step", "3"], "holds no checkpoint"),
        (["base", "trainer.lerning_rate=1"], "trainer.lerning_rate"),
        (["base", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["damaged"], "skyrl.json is damaged"),
    ],
)
def test_what_cannot_talk_is_refused(runs, words, says, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "base").symlink_to(runs["full"].parent / "model")
    shutil.copytree(runs["full"] / "model", tmp_path / "damaged")
    (tmp_path / "damaged" / "skyrl.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *words]) == 2
    assert says in capsys.readouterr().err
