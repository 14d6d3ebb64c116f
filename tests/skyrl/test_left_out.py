"""What is left out of SkyRL's import paths says what to use instead, where it is imported."""

from __future__ import annotations

import importlib

import pytest

from skyrl_train.left_out import MODULES, NAMES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_is_left_out_says_what_to_use(module):
    with pytest.raises(ModuleNotFoundError, match=f"SkyRL's {module} is left out here: ") as caught:
        importlib.import_module(module)
    assert caught.value.name == module


def test_a_module_of_a_package_that_is_left_out_says_it_too():
    with pytest.raises(
        ModuleNotFoundError, match=r"SkyRL's skyrl_train.workers is left out here: trainer.strategy=fsdp2"
    ):
        importlib.import_module("skyrl_train.workers.fsdp.fsdp_worker")


def test_a_name_that_is_left_out_says_what_to_use():
    for module, names in NAMES.items():
        for name, instead in names.items():
            with pytest.raises(ImportError) as caught:
                exec(f"from {module} import {name}", {})
            assert str(caught.value) == f"SkyRL's {module}.{name} is left out here: {instead}"
    with pytest.raises(ImportError, match="get_ray_pg_ready_with_timeout is left out here"):
        exec("from skyrl_train.utils.utils import get_ray_pg_ready_with_timeout", {})


def test_other_names_are_missing_as_in_any_package():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'skyrl_train.no_such_room'"):
        importlib.import_module("skyrl_train.no_such_room")
    assert not hasattr(importlib.import_module("skyrl_train.utils"), "no_such_name")
