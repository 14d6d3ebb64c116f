"""The hook between episodes and batch, the callbacks, and a generator of one's own: whole small runs."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from openai import AsyncOpenAI

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_train.batch.samples import to_samples
from skyrl_train.callbacks import check_callbacks, numbers_of
from skyrl_train.config import load_config
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from skyrl_train.entrypoints.main_generate import EvalOnlyEntrypoint
from skyrl_train.entrypoints.rollout_parts import check_generator
from skyrl_train.generators.base import GeneratorOutput
from skyrl_train.generators.generator_output import output_of, with_output
from skyrl_train.inference_engines.inference_engine_client import InferenceEngineClient
from skyrl_train.ray_ppo_trainer import NEVER_CALLED
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from skyrl_train.run.run import RunRefused
from skyrl_train.trainer import RayPPOTrainer
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory, Turn
from skyrl_train.users_functions import WrongFunction
from skyrl_train.utils.callbacks import CallbackInput, TrainingCallback, TrainingControl
from tests.fakes import EvenEnv, ScriptedEngine
from tests.skyrl.test_generators import SingleTurn
from tests.tiny_models import save_tiny_model, tiny_tokenizer


class OneTurn(EvenEnv):
    def step(self, action: str) -> Any:
        return {**super().step(action), "done": True}


class DAPOTrainer(RayPPOTrainer):
    """SkyRL's documented example: the last tokens before the length limit cost more and more."""

    @torch.no_grad()
    def postprocess_generator_output(self, generator_output: GeneratorOutput, uids: list[str]) -> GeneratorOutput:
        buffer: Any = self.cfg.trainer.algorithm.overlong_buffer
        rewards: Any = generator_output["rewards"]
        assert not isinstance(rewards[0], list), "we assume verifiable sequence level rewards here"
        longest = self.cfg.generator.sampling_params.max_generate_length
        for i, response in enumerate(generator_output["response_ids"]):
            exceeded = len(response) - (longest - buffer.len)
            rewards[i] -= max(exceeded, 0) / buffer.len * buffer.penalty_factor
        generator_output["rewards"] = rewards
        self.all_metrics["mine/longest"] = float(max(map(len, generator_output["response_ids"])))
        return super().postprocess_generator_output(generator_output, uids)


class Notes(TrainingCallback):
    """Writes down every event, asks for one evaluation and one checkpoint, and adds to the log."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_step_end(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None:
        self._note("step_end", callback_input)
        assert callback_input.metrics is not None
        assert "policy/grad_norm" in callback_input.metrics
        assert trainer.global_step == callback_input.global_step
        control.should_evaluate = control.should_save = callback_input.global_step == 1

    def on_log(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None:
        assert callback_input.logs is not None
        callback_input.logs["mine/step"] = callback_input.global_step

    def on_save(self, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None:
        assert callback_input.ckpt_path is not None
        assert Path(callback_input.ckpt_path).is_dir()
        self._note("save", callback_input)

    def _note(self, event: str, where: CallbackInput) -> None:
        self.events.append((event, where.global_step))


async def _coroutine(self: Any, trainer: Any, callback_input: CallbackInput, control: TrainingControl) -> None: ...


def _noting(event: str) -> Any:
    return lambda self, trainer, callback_input, control: self._note(event.removeprefix("on_"), callback_input)


for _event in ("on_train_start", "on_train_end", "on_epoch_start", "on_epoch_end", "on_step_start", "on_eval_end"):
    setattr(Notes, _event, _noting(_event))


def run(folder: Path, experiment: type[BasePPOExp], *more: str) -> tuple[int, Path]:
    if not (folder / "model").exists():
        save_tiny_model(folder / "model")
        rows = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(4)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = folder / experiment.__name__
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    register("one_turn", OneTurn)
    try:
        status = main(
            [
                f"data.train_data=['{folder}/data.jsonl']",
                f"data.val_data=['{folder}/data.jsonl']",
                f"trainer.policy.model.path={folder}/model",
                f"trainer.ckpt_path={where}",
                f"trainer.export_path={where}/exports",
                "trainer.device=cpu",
                "trainer.bf16=false",
                "environment.env_class=one_turn",
                "trainer.train_batch_size=2",
                "trainer.policy_mini_batch_size=2",
                "trainer.algorithm.use_kl_loss=false",
                "trainer.policy.optimizer_config.lr=1e-3",
                "trainer.eval_before_train=false",
                "trainer.eval_interval=10",
                "generator.n_samples_per_prompt=4",
                "generator.sampling_params.max_generate_length=8",
                *more,
            ],
            experiment,
        )
    finally:
        skyrl_gym.envs.deregister("one_turn")
        torch.set_num_threads(threads)
    return status, where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooks")


def test_dapos_overlong_penalty_and_callbacks_run_as_skyrls_documents_write_them(folder):
    notes = Notes()

    class DAPOExp(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            return DAPOTrainer(*args, **kwargs)

        def get_callbacks(self):
            return [notes]

    buffer = "+trainer.algorithm.overlong_buffer"
    status, where = run(folder, DAPOExp, "generator.batched=true", f"{buffer}.len=4", f"{buffer}.penalty_factor=100.0")
    assert status == 0
    lines = read_metrics(where / "metrics.jsonl")
    assert [line["mine/step"] for line in lines] == [1, 2]
    for line in lines:
        played = read_trajectories(trajectory_files(where, "train")[line["step"]])
        assert line["mine/longest"] == 8.0
        lengths = [sum(len(s.ids) for s in episode.segments if s.sampled) for episode in played]
        penalties = [100 * max(length - 4, 0) / 4 for length in lengths]
        earned = [episode.reward for episode in played]  # the records hold what the environment paid
        expected = sum(earned) / len(earned) - sum(penalties) / len(penalties)
        assert line["loss/avg_final_rewards"] == pytest.approx(expected, abs=1e-4)
        assert line["reward/avg_raw_reward"] == pytest.approx(expected, abs=1e-4)
    assert notes.events == [
        ("train_start", 0), ("epoch_start", 1), ("step_start", 1), ("step_end", 1), ("eval_end", 1), ("save", 1),
        ("step_start", 2), ("step_end", 2), ("eval_end", 2), ("epoch_end", 2), ("save", 2), ("train_end", 2),
    ]  # fmt: skip


def test_a_generator_and_a_hook_of_ones_own_train(folder):
    class GeneratorExp(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            return SingleTurn(inference_engine_client, tokenizer)

        async def shape_rewards(self, groups):
            return [Group(group.prompt, [t.plus(10.0 * t.repetition) for t in group.trajectories]) for group in groups]

    status, where = run(folder, GeneratorExp, "trainer.ckpt_interval=-1")
    assert status == 0
    lines = read_metrics(where / "metrics.jsonl")
    for line in lines:
        assert line["mine/calls"] == 1.0
        assert line["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4
        assert line["policy/grad_norm"] > 0
        played = read_trajectories(trajectory_files(where, "train")[line["step"]])
        earned = sum(episode.reward for episode in played) / len(played)
        assert line["loss/avg_final_rewards"] == pytest.approx(earned + 15.0, abs=1e-4)  # 10 * mean of 0, 1, 2, 3


class AskingTheEndpoint(SingleTurn):
    """A generator as SkyRL's for the package verifiers: OpenAI's client, and tokens by the names of their logprobs."""

    async def generate(self, input_batch):
        sampling = dict(input_batch["sampling_params"] or {})
        own = {name: sampling.pop(name) for name in ("min_tokens", "top_k", "min_p", "repetition_penalty")}
        for name in ("skip_special_tokens", "include_stop_str_in_output", "logprobs"):
            del sampling[name]
        url = f"{self.client.get_endpoint_url()}/v1"
        async with AsyncOpenAI(base_url=url, api_key="dummy") as client:
            calls: list[Any] = [
                client.chat.completions.create(
                    model="any",
                    messages=cast("Any", prompt),
                    logprobs=True,
                    top_logprobs=1,
                    extra_body={"return_tokens_as_token_ids": True, **own},
                    **sampling,
                )
                for prompt in input_batch["prompts"]
            ]
            answers = await asyncio.gather(*calls)
        said = [answer.choices[0].logprobs.content for answer in answers]
        ids = [[int(token.token.removeprefix("token_id:")) for token in tokens] for tokens in said]
        output: GeneratorOutput = {
            "prompt_token_ids": [
                self.client.template.encode(prompt, add_generation_prompt=True) for prompt in input_batch["prompts"]
            ],
            "response_ids": ids,
            "rewards": [float(sum(token % 2 for token in tokens)) for tokens in ids],
            "loss_masks": [[1] * len(tokens) for tokens in ids],
            "rollout_logprobs": [[token.logprob for token in tokens] for tokens in said],
            "rollout_metrics": None,
        }
        return output


def test_a_generator_with_openais_client_trains_over_the_endpoint(folder):
    class EndpointExp(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            return AskingTheEndpoint(inference_engine_client, tokenizer)

    served = ("generator.enable_http_endpoint=true", "generator.http_endpoint_port=0")
    sampled = ("generator.sampling_params.temperature=0.7", "trainer.algorithm.policy_loss_type=rollout_is")
    status, where = run(folder, EndpointExp, *served, *sampled, "trainer.ckpt_interval=-1")
    assert status == 0
    for line in read_metrics(where / "metrics.jsonl"):
        assert line["policy/rollout_train_logprobs_abs_diff_mean"] < 1e-4
        assert line["policy/grad_norm"] > 0


def test_a_client_that_no_endpoint_serves_says_how_to_have_one():
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: "yes")
    client = InferenceEngineClient(engine, ChatTemplate(tokenizer), max_model_len=64, seed=0)
    with pytest.raises(ValueError, match=r"set generator.enable_http_endpoint=true"):
        client.get_endpoint_url()


@pytest.mark.parametrize("name", sorted(NEVER_CALLED))
def test_a_trainer_that_overrides_what_nobody_calls_is_refused(name):
    cls = type("MyTrainer", (RayPPOTrainer,), {name: lambda self: None})
    with pytest.raises(ValueError, match=f"MyTrainer.{name} is never called: "):
        cls(None, None, None, None)


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        ("post_process_generator_output", lambda self, output, uids: output, "did you mean postprocess_generator_out"),
        ("postprocess_generator_output", lambda self, output: output, "cannot be called: it is given"),
        ("_remove_tail_data", lambda self, entries: entries, "is never called: batches are whole"),
    ],
)
def test_a_trainers_method_that_would_not_be_called_as_written_is_refused(name, method, says):
    with pytest.raises(ValueError, match=says):
        type("MyTrainer", (RayPPOTrainer,), {name: method})(None, None, None, None)


def test_a_hook_may_be_a_coroutine_and_may_return_arrays_and_a_pair():
    class MyTrainer(RayPPOTrainer):
        async def postprocess_generator_output(self, generator_output, uids):  # ty: ignore[incompatible-method-override]
            output = super().postprocess_generator_output(generator_output, uids)
            return {**output, "rewards": np.array([5.0], dtype=np.float32), "loss_masks": torch.tensor([[1, 0]])}, uids

    trainer = MyTrainer(load_config(["generator.batched=true"]), None, None, None)
    [shaped] = asyncio.run(trainer.shaped([group()]))
    assert shaped.trajectories[0].reward == 5.0
    assert to_samples(shaped.trajectories)[0].loss_mask == [False, False, True, False]


def test_a_hook_that_returns_nothing_is_told():
    cls: Any = type("MyTrainer", (RayPPOTrainer,), {"postprocess_generator_output": lambda self, output, uids: None})
    trainer = cls(load_config(["generator.batched=true"]), None, None, None)
    with pytest.raises(ValueError, match=r"MyTrainer.postprocess_generator_output returned None; it must return"):
        asyncio.run(trainer.shaped([group()]))


def test_callbacks_may_be_one_and_must_be_some():
    one = Notes()
    assert check_callbacks(one) == [one]
    with pytest.raises(ValueError, match="must be a list of TrainingCallbacks, not None"):
        check_callbacks(None)


def test_callbacks_are_added_to_a_trainer():
    trainer, notes = RayPPOTrainer(None, None, None, None), Notes()
    trainer.add_callback(notes)
    assert trainer.callbacks == [notes]
    with pytest.raises(ValueError, match="object is no TrainingCallback"):
        trainer.add_callback(object())  # ty: ignore[invalid-argument-type]


def test_what_get_trainer_may_not_return_is_refused(folder, capsys):
    class WrongTrainerExp(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            return "a trainer"

    assert run(folder, WrongTrainerExp)[0] == 2
    assert "refused: get_trainer returned str; it must return a RayPPOTrainer" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["a generator", SingleTurn])
def test_what_get_generator_may_not_return_is_refused(given):
    with pytest.raises(RunRefused, match="it must return a GeneratorInterface, or None"):
        check_generator(given)


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("get_train_dataset", "refused: get_train_dataset returned None: there is nothing to train on"),
        ("get_tokenizer", "refused: get_tokenizer returned None; it must return a tokenizer of transformers"),
        ("get_callbacks", "refused: callbacks must be a list of TrainingCallbacks, not None"),
    ],
)
def test_a_hook_of_the_experiment_that_returns_nothing_is_refused(folder, capsys, hook, says):
    forgetful = type("ForgetfulExp", (BasePPOExp,), {hook: lambda self: None})
    assert run(folder, forgetful)[0] == 2
    assert says in capsys.readouterr().err


def generator_of_answers(self: Any, *given: Any) -> Any:
    yield given


async def async_generator_of_answers(self: Any, *given: Any) -> Any:
    yield given


@pytest.mark.parametrize(
    ("hook", "override", "status", "says"),
    [
        ("get_policy", lambda self: None, 2, "refused: get_policy returned NoneType, which has no module"),
        ("get_engine", lambda self, policy: 3, 2, "refused: get_engine returned int, which has no generate, pause"),
        ("get_learner", lambda self, policy: "x", 2, "refused: get_learner returned str, which has no add_logprobs"),
        ("shape_rewards", lambda self, groups: None, 1, "stopped: shape_rewards returned NoneType; it must return"),
        ("shape_rewards", lambda self, groups: (x for x in groups), 1, "shape_rewards returned generator; it must"),
        ("shape_rewards", lambda self, groups: groups[:1], 1, "was given 8 episodes and returned 4 or others"),
        ("shape_rewards", generator_of_answers, 2, "shape_rewards is a generator function, so a call does nothing"),
        ("shape_rewards", async_generator_of_answers, 2, "shape_rewards is a generator function"),
        (
            "extra_metrics",
            lambda self: None,
            1,
            "what extra_metrics() returns must be a dict of names and numbers, not",
        ),
        ("extra_metrics", lambda self: {"a": "b"}, 1, "names and numbers; a is of type str"),
        ("get_generator", lambda self, *given: Yields(), 2, "Yields.generate is a generator function"),
        ("get_generator", lambda self, *given: TakesNothing(), 2, "TakesNothing.generate must take (input_batch): too"),
        ("get_trainer", lambda self, **given: OnItsOwn(), 2, "get_trainer, whose __init__ does not call super()"),
    ],
)
def test_what_a_hook_may_not_be_or_return_is_told_in_one_line(folder, capsys, hook, override, status, says):
    assert run(folder, type("WrongExp", (BasePPOExp,), {hook: override}), "trainer.resume_mode=none")[0] == status
    assert says in capsys.readouterr().err


class Yields:
    generate = async_generator_of_answers


class TakesNothing:
    async def generate(self) -> Any:
        return {}


class OnItsOwn(RayPPOTrainer):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("logged", "says"),
    [
        ({"a": "text"}, r"the logs of on_log must be a dict of names and numbers; a is of type str"),
        ({3: 1.0}, r"3 is no text"),
        ({"a": None}, r"a is of type NoneType"),
        ([], r"names and numbers, not list"),
        ({"a": [1.0, 2.0]}, r"a is of type list"),
    ],
)
def test_what_is_no_metric_is_told(logged, says):
    with pytest.raises(WrongFunction, match=says):
        numbers_of(logged, "the logs of on_log")


def test_numbers_of_other_packages_are_metrics():
    given = {"a": 1, "b": 0.5, "c": np.float32(0.25), "d": torch.tensor(2.0), "e": True}
    assert numbers_of(given, "the logs") == {"a": 1, "b": 0.5, "c": 0.25, "d": 2.0, "e": True}


def test_a_generator_whose_close_would_never_run_is_refused():
    class Closing(SingleTurn):
        async def close(self): ...

    with pytest.raises(RunRefused, match=r"Closing.close is written with `async def`"):
        check_generator(Closing.__new__(Closing))


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (object(), "object is no TrainingCallback"),
        (TrainingCallback, r"TrainingCallback is a class; give an object of it: TrainingCallback\(\)"),
        (
            type("A", (TrainingCallback,), {"on_step_ends": lambda *a: None})(),
            r"A.on_step_ends is never called; the ev",
        ),
        (type("C", (TrainingCallback,), {"on_step_end": _coroutine})(), r"C.on_step_end is written with `async def`"),
        (type("B", (TrainingCallback,), {"on_step_end": lambda self, trainer: None})(), r"B.on_step_end must take"),
    ],
)
def test_a_callback_that_would_never_be_called_is_refused(callback, says):
    with pytest.raises(ValueError, match=says):
        RayPPOTrainer(None, None, None, None, callbacks=[callback])


def test_a_run_that_only_evaluates_learns_nothing_and_returns_its_metrics(folder):
    seen: list[dict[str, float]] = []

    class EvalExp(EvalOnlyEntrypoint):
        async def run(self):
            seen.append(await super().run())
            return seen[0]

    status, where = run(folder, EvalExp, "generator.eval_n_samples_per_prompt=2")
    assert status == 0
    [line] = read_metrics(where / "metrics.jsonl")
    assert line["step"] == 0
    assert line["eval/all/avg_score"] == seen[0]["eval/all/avg_score"]
    dumped = where / "exports" / "dumped_evals" / "eval_only"
    assert len((dumped / "unknown.jsonl").read_text().splitlines()) == 8
    assert run(folder, EvalExp, "data.val_data=[]")[0] == 2


def test_evaluation_alone_as_skyrls_generation_script_asks_for_it_ends_with_a_command_that_starts(
    folder, monkeypatch, capsys
):
    class EvalAlone(EvalOnlyEntrypoint):
        pass

    typed = [
        "trainer.placement.colocate_all=false",
        "generator.backend=vllm",
        "generator.num_inference_engines=2",
        "generator.gpu_memory_utilization=0.9",
    ]
    monkeypatch.setattr(sys, "argv", ["main_generate.py", *typed])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "main_generate", *typed])
    assert run(folder, EvalAlone, *typed)[0] == 2
    words = capsys.readouterr().err
    assert "generator.backend=vllm is not possible in evaluation alone" in words
    command = words.partition("This would start:\n")[2].splitlines()[0]
    assert shlex.split(command) == ["python", "-m", "main_generate", "trainer.placement.colocate_all=false"]
    assert run(folder, EvalAlone, *shlex.split(command)[3:])[0] == 0


def group() -> Group:
    prompt = Prompt("0", [{"role": "user", "content": "x"}], "one_turn")
    turn = Turn([1, 2], [3, 4], [-0.1, -0.2], 1.0, "ab", "stop", 0)
    return Group(prompt, [Trajectory(prompt, 0, 0, prompt.messages, [turn], EpisodeEnd.FINISHED)])


def test_tokens_that_were_changed_are_refused():
    output, _ = output_of([group()], one_reward=True)
    output["response_ids"][0][0] = 9
    with pytest.raises(ValueError, match="the tokens of entry 0 were changed"):
        with_output([group()], output)


def test_a_hook_returns_the_episodes_it_was_given():
    from skyrl_train.batch.samples import check_shaped

    check_shaped([group()], ["0_0"])
    with pytest.raises(ValueError, match="was given 2 episodes and returned 1"):
        check_shaped([group()], ["0_0", "0_1"])
    with pytest.raises(ValueError, match="must return the list of groups"):
        check_shaped([None], ["0_0"])
    output, _ = output_of([group()], one_reward=True)
    [shaped] = with_output([group()], output)
    [trajectory] = shaped.trajectories
    assert trajectory.plus(2.0).reward == 3.0
    check_shaped([Group(shaped.prompt, [trajectory.plus(2.0)])], ["0_0"])
    wrong = replace(trajectory, turns=[])
    with pytest.raises(ValueError, match=r"its turns were paid 0.0, its samples 1.0"):
        check_shaped([Group(shaped.prompt, [wrong])], ["0_0"])
