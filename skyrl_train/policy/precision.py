"""The device and the type that a model computes in, and why: decided by what the machine has, never by timing."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from loguru import logger

from skyrl_train.config.problems import Unfit


def choose_device(wanted: str) -> torch.device:
    """Return the device that `wanted` names: auto (the GPU if there is one, else the CPU), cpu or cuda. ValueError."""
    device = torch.device(wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "auto" and device.type == "cpu" and nvidia_driver() is not None:
        logger.warning(f"training on the CPU, although there is an NVIDIA driver: {_why_no_gpu()}")
    if device.type == "cuda" and not torch.cuda.is_available():
        words = f"device={wanted}, but torch finds no CUDA GPU on this machine: {_why_no_gpu()}"
        raise Unfit(words, "trainer.device=cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={wanted} is not supported; use auto, cpu or cuda")
    if device.type == "cuda":  # it plans each new shape for 60 ms to 1.7 s (H200), and here most shapes are new
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _why_no_gpu() -> str:
    """Return what torch and the driver say of themselves, and what to do."""
    ours, cuda, driver = f"torch {torch.__version__}", torch.version.cuda, nvidia_driver()
    if cuda is None:
        return (
            f"{ours} is a build without CUDA; install one with it (a +cpu wheel in a folder that UV_FIND_LINKS or "
            "PIP_FIND_LINKS names is taken before PyPI's), or use device=cpu"
        )
    needed = 580 if int(cuda.partition(".")[0]) >= 13 else 525
    if driver is None:
        return f"{ours} has CUDA {cuda}, but there is no NVIDIA driver; use device=cpu"
    if int(driver.partition(".")[0]) < needed:
        return (
            f"{ours} has CUDA {cuda}, which needs NVIDIA driver {needed} or later, but this one is {driver}; update "
            "the driver, install a torch for an older CUDA, or use device=cpu"
        )
    return (
        f"{ours} has CUDA {cuda}, and NVIDIA driver {driver} is new enough; see nvidia-smi and CUDA_VISIBLE_DEVICES "
        "for the GPUs that this process may use, or use device=cpu"
    )


def nvidia_driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the loaded NVIDIA driver; None: there is none."""
    try:
        text = told.read_text()
    except OSError:
        return None
    found = re.search(r"NVRM version:.*?\s(\d+\.[\d.]*\d)", text)
    return found and found[1]


def choose_compute_dtype(device: torch.device, wanted: bool | None) -> tuple[torch.dtype, str]:
    """Return the type of weights and matmuls, and a sentence that says why. `wanted` None: decide here.

    A resumed run must choose as the first one did, so this depends on what the device can do and on nothing else.
    """
    if wanted is not None:
        dtype = torch.bfloat16 if wanted else torch.float32
        return dtype, f"computing in {_name(dtype)}, as the configuration asks"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"computing in bfloat16: {torch.cuda.get_device_name(device)} has it in hardware"
        return torch.float32, f"computing in float32: {torch.cuda.get_device_name(device)} has no bfloat16 in hardware"
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "computing in bfloat16: this CPU multiplies bfloat16 matrices in hardware (AMX)"
    if torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "computing in bfloat16: this CPU has bfloat16 dot products (AVX-512)"
    return torch.float32, "computing in float32: this CPU has no fast bfloat16 matmuls"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
