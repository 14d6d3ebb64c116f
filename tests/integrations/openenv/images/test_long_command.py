from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.images import long_command
from integrations.openenv.images.long_command import run_long_command


async def test_a_failure_is_told_with_the_last_twenty_lines() -> None:
    with pytest.raises(OpenEnvError) as failed:
        await run_long_command("sh", "-c", "seq 30; echo oh no >&2; exit 3", timeout_s=60)
    lines = str(failed.value).splitlines()
    assert lines[0] == "sh -c failed"
    assert [line.strip() for line in lines[1:]] == [*map(str, range(12, 31)), "oh no"]


async def test_a_deadline_ends_the_command() -> None:
    with pytest.raises(OpenEnvError, match=r"sh -c took longer than 5 s\n    started"):
        await run_long_command("sh", "-c", "echo started; exec sleep 600", timeout_s=5)


async def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(OpenEnvError, match="the no-such-command command is not installed"):
        await run_long_command("no-such-command", timeout_s=1)


async def test_a_command_that_does_not_read_all_its_input_is_judged_by_its_exit_code() -> None:
    await run_long_command("true", stdin=b"x" * 10_000_000, timeout_s=60)


async def test_without_a_terminal_a_line_now_and_then_shows_that_it_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(long_command, "REPORT_EVERY_S", 0.2)
    waits = f"echo Step 1/9; while [ ! -e {tmp_path}/seen ]; do sleep 0.05; done"
    running, shown = asyncio.create_task(run_long_command("sh", "-c", waits, timeout_s=200)), ""
    while "s ... Step 1/9" not in shown:
        assert not running.done(), "it ended although nothing was shown"
        await asyncio.sleep(0.05)
        shown += capsys.readouterr().out
    (tmp_path / "seen").touch()
    await running
