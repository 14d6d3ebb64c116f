import subprocess
import sys

import pytest

from skyrl_train.config import load_config
from skyrl_train.config.problems import ConfigError
from skyrl_train.engine.base import SamplingParams
from skyrl_train.engine.vllm.settings import VllmSettings, fits, logprobs_mode, refuse_what_vllm_cannot

CUTS = [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"min_tokens": 2}]


def params(**settings) -> SamplingParams:
    return SamplingParams(max_tokens=9, **settings)


@pytest.mark.parametrize("cut", [{}, *CUTS])
def test_at_temperature_1_and_greedy_raw_logprobs_are_the_learners(cut):
    assert logprobs_mode(params(**cut), params(temperature=0.0, **cut)) == "raw_logprobs"


def test_at_another_temperature_those_of_the_distribution_that_is_sampled_are():
    assert logprobs_mode(params(temperature=0.7), params(temperature=0.0)) == "processed_logprobs"
    assert logprobs_mode(params(temperature=0.7), params(temperature=1.2)) == "processed_logprobs"
    assert not fits(params(temperature=0.7), "raw_logprobs")


def test_greedy_sampling_is_not_cut():
    assert logprobs_mode(params(temperature=0.7), params(temperature=0.0, top_p=0.5, top_k=3)) == "processed_logprobs"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("where", [0, 1])
def test_another_temperature_and_a_cut_exclude_each_other_wherever_they_stand(cut, where):
    [(key, value)] = cut.items()
    with pytest.raises(ValueError, match=f"or drop {key}={value:g}"):
        logprobs_mode(params(temperature=0.7, **cut))
    apart = [params(temperature=0.7), params(temperature=1.0, **cut)]
    with pytest.raises(ValueError, match=r"temperature 0\.7 without it"):
        logprobs_mode(apart[where], apart[1 - where])


def problems(*overrides: str) -> str:
    try:
        refuse_what_vllm_cannot(load_config(["data.train_data=[a.parquet]", *overrides]))
    except ConfigError as error:
        return str(error)
    return ""


def test_the_defaults_are_possible():
    assert problems() == ""
    assert problems("generator.sampling_params.temperature=0.7") == ""
    assert problems("generator.sampling_params.top_p=0.9", "generator.sampling_params.stop=[a]") == ""


def test_every_reason_is_said_at_once():
    said = problems(
        "trainer.deterministic=true",
        "generator.sampling_params.temperature=0.7",
        "generator.eval_sampling_params.repetition_penalty=1.1",
    )
    assert said.startswith("2 problems")
    assert "trainer.deterministic=true is not possible with vLLM" in said
    assert "or drop repetition_penalty=1.1" in said


@pytest.mark.parametrize("key", ["load_format", "dtype", "seed", "enable_chunked_prefill"])
def test_what_our_settings_decide_is_no_further_argument(key):
    with pytest.raises(ValueError, match=f"engine_init_kwargs.{key} cannot be set"):
        VllmSettings("folder", "float32", 1, 1, engine_init_kwargs={key: 1})


def test_settings_and_weights_import_no_vllm_and_no_ray():
    rooms = "skyrl_train.engine.vllm.settings, skyrl_train.weights.shared_memory"
    code = f"import sys, {rooms}; print({{'vllm', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
