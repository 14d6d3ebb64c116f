from __future__ import annotations

import pytest
import torch
from loguru import logger

from skyrl_train.policy import precision
from skyrl_train.policy.precision import choose_device, nvidia_driver

TOLD = "NVRM version: NVIDIA UNIX {kind}  {version}  Thu Feb  1 01:35:40 UTC 2024\nGCC version:  gcc version 12.3.0"


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("x86_64 Kernel Module", "535.183.01"),
        ("x86_64 Kernel Module", "580.65"),
        ("Open Kernel Module for x86_64", "570.86.15"),
    ],
)
def test_the_driver_is_read(tmp_path, kind, version):
    (tmp_path / "version").write_text(TOLD.format(kind=kind, version=version))
    assert nvidia_driver(tmp_path / "version") == version


def test_no_driver(tmp_path):
    assert nvidia_driver(tmp_path / "version") is None
    (tmp_path / "version").write_text("something else")
    assert nvidia_driver(tmp_path / "version") is None


@pytest.mark.parametrize(
    ("cuda", "driver", "says"),
    [
        (None, "580.65.06", "is a build without CUDA"),
        ("13.0", None, "no NVIDIA driver"),
        ("13.0", "570.86.15", "has CUDA 13.0, which needs NVIDIA driver 580 or later, but this one is 570.86.15"),
        ("12.6", "470.82.01", "needs NVIDIA driver 525 or later"),
        ("12.6", "535.183.01", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_find_is_explained(monkeypatch, cuda, driver, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(precision, "nvidia_driver", lambda: driver)
    with pytest.raises(ValueError, match="torch finds no CUDA GPU on this machine") as refused:
        choose_device("cuda")
    assert says in str(refused.value)
    assert torch.__version__ in str(refused.value)
    assert "device=cpu" in str(refused.value)


@pytest.mark.parametrize("driver", [None, "570.86.15"])
def test_auto_says_when_it_leaves_a_gpu_unused(monkeypatch, driver):
    said = []
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "nvidia_driver", lambda: driver)
    try:
        assert choose_device("auto") == torch.device("cpu")
    finally:
        logger.remove(sink)
    assert len(said) == (driver is not None)
