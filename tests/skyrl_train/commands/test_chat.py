"""`skyrl chat`: lines in, replies out, token for token what the engine says; and what a RUN|MODEL may be."""

from __future__ import annotations

import asyncio
import io
import shutil
from pathlib import Path

import pytest

from skyrl_train.commands.main import main
from skyrl_train.commands.sources import source
from skyrl_train.commands.trained import Talker
from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.visible import visible

CPU = ["trainer.device=cpu", "trainer.bf16=false"]


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


def test_a_line_that_is_no_unicode_text_is_answered(runs, capsys, monkeypatch):
    assert chat(capsys, monkeypatch, "caf\udce9\n", str(runs["full"])) == chat(
        capsys, monkeypatch, "caf?\n", str(runs["full"])
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["./nowhere"], "there is no such folder"),
        (["."], ". is no run: it holds no checkpoint"),
        (["run/report.html"], "report.html is a file; give a run's folder, or a model's. It belongs to the run in"),
        (["base", "--before"], "base is no run, so there is nothing before it"),
        (["base", "--step", "3"], "holds no checkpoint"),
        (["base", "trainer.lerning_rate=1"], "trainer.lerning_rate"),
        (["base", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["base", "--temperature", "nan"], "temperature=nan must be 0"),
        (["plain", "--system", "x"], "no system messages"),
        (["damaged"], "skyrl.json is damaged"),
    ],
)
def test_what_cannot_talk_is_refused(runs, words, says, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "base").symlink_to(runs["full"].parent / "model")
    (tmp_path / "run").symlink_to(runs["full"])
    shutil.copytree(runs["full"] / "model", tmp_path / "damaged")
    shutil.copytree(runs["full"].parent / "model", tmp_path / "plain")
    template = (tmp_path / "plain" / "chat_template.jinja").read_text()
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    (tmp_path / "plain" / "chat_template.jinja").write_text(refusing + template)
    (tmp_path / "damaged" / "skyrl.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *words]) == 2
    assert says in capsys.readouterr().err
