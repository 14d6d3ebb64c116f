"""The pages of docs/ as a person types them; only the model is a tiny one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from integrations.openenv.prepare_dummy_dataset import dataset_rows, write_parquet
from skyrl_train.run.metrics import read_metrics
from tests.docs.pages import ROOT, Page, typed, typed_here
from tests.tiny_models import save_tiny_model

TINY = ("trainer.policy.model.path=model", "trainer.device=cpu", "trainer.bf16=false", "trainer.ckpt_interval=-1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path


def test_the_page_about_an_own_environment(folder, capsys):
    page = Page.read("your-own-environment.md")
    assert list(page.files) == ["my_game.py", "make_tasks.py", "my_reward.py", "train_it.py"]
    lines = [line for line in page.files["my_game.py"].splitlines() if line]
    assert len(lines) <= 12, "as its title says"
    assert '"path": "auto"' in page.files["train_it.py"]
    page.write_files(folder, **{'"path": "auto"': '"path": "model"', '"epochs": 16': '"epochs": 1'})
    make, check, play, train, watch, reward, chat, compare, evaluate, from_python = page.commands
    typed(make, folder)
    checked = typed(check, folder)
    assert "my_game:OneWord: keeps the contract" in checked
    assert "rewards 0 to 1" in checked
    assert "reward 1\nThe end." in typed(play, folder, lines="red\n")
    typed_here(train, folder, *TINY[:-1], "trainer.epochs=1")
    assert {line["step"] for line in read_metrics(folder / "runs/one_word/metrics.jsonl")} == {0, 1, 2}
    assert (folder / "runs/one_word/report.html").is_file()
    capsys.readouterr()
    typed_here(watch, folder)
    assert "Say the word chair and nothing else." in capsys.readouterr().out
    typed_here(reward, folder, *TINY[:-1], "trainer.epochs=1")  # keeps a checkpoint, and with it the model
    assert json.loads((folder / "runs/reward/summary.json").read_text())["environment"] == "single_turn"
    capsys.readouterr()
    typed_here(chat, folder, "--max-tokens", "4", lines="hello\n/quit\n")
    assert capsys.readouterr().out.strip()
    typed_here(compare, folder)
    assert "environment.reward" in capsys.readouterr().out
    typed_here(evaluate, folder)
    assert "runs/reward" in capsys.readouterr().out
    typed_here(from_python, folder)
    assert re.fullmatch(r"\d\.\d+ \d\.\d+", capsys.readouterr().out.splitlines()[-1])


def test_the_page_about_an_own_server(folder):
    page = Page.read("your-own-openenv-server.md")
    init, many, play, check, prepare, train, watch = page.commands
    typed(init, folder)
    assert (folder / "guess_env" / "server" / "app.py").is_file()
    page.write_files(folder)
    subprocess.run(shlex.split(many), cwd=folder, check=True)
    played = typed(play, folder, lines="".join(f"{guess}\n" for guess in (1, 3, 5, 7, 9)) + "q\n")
    assert "Guess a number from 1 to 9." in played
    assert "Higher." in played
    typed_here(check, folder, "-n", "3")
    typed_here(prepare, folder, "--num_train", "8", "--num_validation", "2")
    typed_here(train, folder, *TINY[:-1], "generator.sampling_params.max_generate_length=4")
    assert {line["step"] for line in read_metrics(folder / "runs/guess/metrics.jsonl")} >= {1, 2}
    assert typed(watch, folder).count("Guess a number from 1 to 9.") == 1


@pytest.mark.timeout(900)
def test_the_tutorial(folder, capsys):
    page = Page.read("tutorial.md")
    assert list(page.files) == ["nim_env/models.py", "nim_env/server/nim_env_environment.py", "my_reward.py"]
    echo, watch, init, many, play, check, prepare, train, watch_nim, shaped, compare, evaluate, export, chat = (
        page.commands
    )
    fast = (*TINY[:-1], "trainer.eval_interval=-1", "generator.n_samples_per_prompt=2")

    def printed(command: str, *more: str, lines: str = "") -> str:
        typed_here(command, folder, *more, lines=lines)
        return capsys.readouterr().out

    for split, rows in zip(("train", "validation"), dataset_rows("echo_env", 4, 2, seed=0), strict=True):
        write_parquet(rows, folder / "echo" / f"{split}.parquet")
    printed(echo, *fast, "--data-dir", "echo")
    assert "turn 1" in printed(watch)
    printed(init)
    page.write_files(folder)
    subprocess.run(shlex.split(many), cwd=folder, check=True)
    assert "The end." in printed(play, lines="1\n" * 6)
    printed(check, "-n", "3")
    printed(prepare, "--num_train", "4", "--num_validation", "2")
    printed(train, *fast)
    assert "Whoever takes the last one wins." in printed(watch_nim, "--pace", "0")
    printed(shaped, *fast)
    assert "my_reward:score" in printed(compare)
    assert "nim_shaped" in printed(evaluate)
    printed(export)
    assert "hello" not in printed(chat, "--max-tokens", "4", lines="hello\n/quit\n")


def test_every_link_of_the_pages_leads_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
