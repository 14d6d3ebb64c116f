"""Start Ray for SkyRL's mains, which run inside a Ray task; its workers know what the driver registered."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from skyrl_train.algorithms import AdvantageEstimatorRegistry, PolicyLossRegistry
from skyrl_train.algorithms.skyrl_style import is_ours

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from skyrl_train.config import SkyRLConfig

Functions = dict[str, Any]


def initialize_ray(cfg: DictConfig | SkyRLConfig | None = None) -> None:
    """Start Ray on this machine, unless it runs. Workers get the registered functions and all processor cores.

    Ray sets the number of threads of a task with num_cpus=1 to one, and the run computes in that task.
    """
    ray = import_ray()
    if ray.is_initialized():
        return
    functions = registered_by_users()

    def set_up_worker() -> None:  # Ray takes a function alone, nothing else that can be called
        register_all(*functions)

    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    ray.init(
        include_dashboard=False,
        runtime_env={
            "env_vars": {"OMP_NUM_THREADS": threads},
            "worker_process_setup_hook": set_up_worker,
        },
    )


def skyrl_entrypoint(experiment: type) -> Any:
    """SkyRL's Ray task: `ray.get(skyrl_entrypoint.remote(cfg))` builds the experiment in a worker and runs it."""
    ray = import_ray()

    @ray.remote(num_cpus=1)
    def skyrl_entrypoint(cfg: Any) -> None:
        experiment(cfg).run()

    return skyrl_entrypoint


def import_ray() -> Any:
    """Return the module. Raise an ImportError that names the extra where Ray is not installed.

    Ray reads the settings when it is imported: nothing is reported to its makers, and a driver below `uv run` starts
    its workers with its own Python instead of another `uv run`, which fails outside the project's folder. And one when
    it starts: its workers get as much of a busy machine as the driver, where Ray would give them niceness 15.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ModuleNotFoundError(
            "processes of their own are started by Ray, and Ray is not installed: uv sync --inexact --extra cluster "
            "(pip install 'skyrl-train[cluster]'); python -m skyrl_train.entrypoints.main_base with one device and the "
            "torch engine needs no Ray",
            name="ray",
        ) from None
    return ray


def registered_by_users() -> tuple[Functions, Functions]:
    """(estimators, losses) that are not the project's own. Environments are registered inside the task."""
    estimators, losses = AdvantageEstimatorRegistry.functions, PolicyLossRegistry.functions
    return (
        {name: function for name, function in estimators.items() if not is_ours(function)},
        {name: function for name, function in losses.items() if not is_ours(function)},
    )


def register_all(estimators: Functions, losses: Functions) -> None:
    """Register in this process what is not registered yet."""
    for registry, functions in ((AdvantageEstimatorRegistry, estimators), (PolicyLossRegistry, losses)):
        for name, function in functions.items():
            if name not in registry.functions:
                registry.register(name, function)
