"""The training run of the workers behind run_openenv.sh, with the arguments that the script gives the trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from integrations.openenv.entrypoints.main_openenv import OpenEnvExp, OpenEnvRunConfig
from integrations.openenv.env import register_openenv
from integrations.openenv.recipe import with_recipe
from skyrl_train.entrypoints.main_base import main


def train(experiment: type[OpenEnvExp], overrides: Sequence[str] = ()) -> int:
    """Train as main_openenv does, with an experiment that reports.

    Leaves out the command line's last word (settings).
    """
    register_openenv()
    return main([*with_recipe(sys.argv[1:-1]), *overrides], experiment=experiment, root=OpenEnvRunConfig)
