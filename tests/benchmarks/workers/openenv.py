"""What the workers behind run_openenv.sh share: the arguments that the script gives to the trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from integrations.openenv.entrypoints.main_openenv import OpenEnvExp, OpenEnvRunConfig
from integrations.openenv.env import register_openenv
from skyrl_train.entrypoints.main_base import main


def train(experiment: type[OpenEnvExp], overrides: Sequence[str] = ()) -> int:
    """As main_openenv does it, with an experiment that reports. The last word of the command line is for the worker."""
    register_openenv()
    return main([*sys.argv[1:-1], *overrides], experiment=experiment, root=OpenEnvRunConfig)
