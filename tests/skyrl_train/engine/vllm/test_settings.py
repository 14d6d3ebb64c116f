import subprocess
import sys

import pytest

from skyrl_train.config import load_config
from skyrl_train.config.problems import ConfigError
from skyrl_train.engine.vllm.settings import VllmSettings, refuse_what_vllm_cannot


def problems(*overrides: str) -> str:
    try:
        refuse_what_vllm_cannot(load_config(["data.train_data=[a.parquet]", *overrides]))
    except ConfigError as error:
        return str(error)
    return ""


def test_the_defaults_are_possible_and_so_are_cuts_at_any_temperature():
    assert problems() == ""
    assert problems("generator.sampling_params.temperature=0.6", "generator.sampling_params.top_p=0.95") == ""
    assert problems("generator.eval_sampling_params.repetition_penalty=1.1") == ""


def test_every_reason_is_said_at_once():
    said = problems(
        "trainer.deterministic=true",
        "generator.sampling_params.temperature=0.005",
        "generator.eval_sampling_params.temperature=0.001",
    )
    assert said.startswith("3 problems")
    assert "trainer.deterministic=true is not possible with vLLM" in said
    assert "generator.sampling_params.temperature=0.005 would be 0.01 in vLLM" in said
    assert "generator.eval_sampling_params.temperature=0.001" in said


@pytest.mark.parametrize("key", ["load_format", "dtype", "seed", "enable_chunked_prefill"])
def test_what_our_settings_decide_is_no_further_argument(key):
    with pytest.raises(ValueError, match=f"engine_init_kwargs.{key} cannot be set"):
        VllmSettings("folder", "float32", 1, 1, engine_init_kwargs={key: 1})


def test_settings_and_weights_import_no_vllm_and_no_ray():
    rooms = "skyrl_train.engine.vllm.settings, skyrl_train.weights.shared_memory"
    code = f"import sys, {rooms}; print({{'vllm', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
