"""`python -m skyrl_train.entrypoints.main_base key=value ...`: configuration in, a trained policy out."""

from __future__ import annotations

import asyncio
import errno
import inspect
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from skyrl_train.config import SkyRLConfig, TrainerConfig, config_dir, load_config, validate_cfg
from skyrl_train.config.load import command_instead
from skyrl_train.config.problems import Unfit
from skyrl_train.console import lasting_output
from skyrl_train.entrypoints.experiment import BasePPOExp
from skyrl_train.entrypoints.process import Exit
from skyrl_train.files import told
from skyrl_train.signals import ends_when_asked, interrupted, interrupted_status, usual_signals_afterwards
from skyrl_train.visible import make_errors_visible, say

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a disk says that takes no more

__all__ = ["BasePPOExp", "asks_for_help", "config_dir", "main", "validate_cfg"]


def main(
    arguments: Sequence[str] | None = None,
    experiment: type[BasePPOExp] = BasePPOExp,
    root: type[SkyRLConfig] = SkyRLConfig,
) -> int:
    """Train or evaluate, and return the exit status (process.Exit). What breaks otherwise shows its traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with usual_signals_afterwards(), lasting_output():
        make_errors_visible()
        if asks_for_help(arguments):
            print(usage())
            return Exit.DONE
        try:
            return _main(arguments, experiment, root)
        except KeyboardInterrupt:
            return interrupted()


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether `main` would only print its help: a program that prepares something for it looks here first."""
    return any(word in ("-h", "--help") for word in words)


def usage() -> str:
    """Return what --help prints: how this program is called, what it is for, and where its keys are."""
    program = sys.modules["__main__"]
    spec = getattr(program, "__spec__", None)
    called = f"python -m {spec.name}" if spec is not None else Path(sys.argv[0]).name
    return (
        f"usage: {called} key=value ...\n\n{(program.__doc__ or 'Train a model.').strip()}\n\n"
        "Every key, with its default and meaning: python -m skyrl_train.config [--search WORD]\n"
        "Exit status: 0 done, 1 broken off, 2 refused before anything began, 130 interrupted, 143 by SIGTERM."
    )


EXPERIMENT, ROOT = BasePPOExp, SkyRLConfig  # what `main` trains with


def _main(arguments: Sequence[str], experiment: type[BasePPOExp], root: type[SkyRLConfig]) -> int:
    try:
        cfg = load_config(arguments, root)
    except ValueError as error:
        return _refused(error)
    from skyrl_train.engine.base import engine_death
    from skyrl_train.learner.base import LearnerDied
    from skyrl_train.policy.refusal import ModelRefused
    from skyrl_train.rollout.dynamic_sampling import TooManyBatches
    from skyrl_train.rollout.round import EveryEpisodeFailed
    from skyrl_train.run.run import RunRefused
    from skyrl_train.users_functions import WrongFunction
    from skyrl_train.weights.base import PushFailed

    try:
        exp = experiment(cfg)
    except Unfit as error:
        return _refused(f"{error}{command_instead(error, arguments, root)}")
    except (ValueError, OSError) as error:  # of the model or the data
        return _refused(error)
    try:
        result = exp.run()
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except (RunRefused, ModelRefused) as error:
        return _refused(error)
    except (EveryEpisodeFailed, TooManyBatches, PushFailed, LearnerDied, WrongFunction) as error:
        return _stopped(error, cfg.trainer)
    except (KeyboardInterrupt, asyncio.CancelledError):
        say(f"interrupted; {_how_to_go_on(cfg.trainer)}")
        return interrupted_status()
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is None:
            raise
        say(f"broken off: cannot write {error.filename}: {error.strerror}{_room(error)}")
        say(f"When there is room, {_how_to_go_on(cfg.trainer)}")
        return Exit.STOPPED
    except Exception as error:
        if (death := engine_death(error)) is not None:  # however it was wrapped on its way
            return _stopped(death, cfg.trainer)
        raise
    return Exit.DONE


def _stopped(error: Exception, trainer: TrainerConfig) -> int:
    say(f"stopped: {error}\n{_how_to_go_on(trainer)}")
    return Exit.STOPPED


def _room(error: OSError) -> str:
    """Return " (0 MB free there)" if the system says so."""
    folder = Path(error.filename).absolute()
    folder = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)
    with suppress(OSError):
        return f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB free there)"
    return ""


def _how_to_go_on(trainer: TrainerConfig) -> str:
    from skyrl_train.run.run_folder import checkpoint_steps

    steps = checkpoint_steps(Path(trainer.ckpt_path))
    if steps:
        return f"the same command goes on after step {steps[-1]}, the newest checkpoint in {trainer.ckpt_path}"
    return f"no checkpoint was due yet (trainer.ckpt_interval={trainer.ckpt_interval}): the same command begins again"


def _refused(error: Exception | str) -> int:
    say(f"refused: {told(error) if isinstance(error, Exception) else error}")
    return Exit.REFUSED


_MAKERS_OF_ENGINES = (
    "create_ray_wrapped_inference_engines_from_config",
    "create_remote_inference_engines_from_config",
)


def __getattr__(name: str) -> Any:
    """Make `skyrl_entrypoint`, SkyRL's Ray task, when it is asked for: only who uses Ray waits for its import.

    SkyRL's makers of engines can be imported, as its examples do, and refuse to be called.
    """
    if name == "skyrl_entrypoint":
        from skyrl_train.cluster.start import skyrl_entrypoint

        return skyrl_entrypoint(BasePPOExp)
    if name in _MAKERS_OF_ENGINES:
        return partial(_refuse_maker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse_maker(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"{name} makes SkyRL's engines, which are not here; override get_engine(policy) instead")


if __name__ == "__main__":
    sys.exit(ends_when_asked(main))
