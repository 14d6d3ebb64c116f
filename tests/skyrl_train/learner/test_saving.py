"""A learner's files are written while it goes on: they hold the state of the moment in which that began."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from skyrl_train.learner import saved
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.learner.saved import SavedLearner
from tests.skyrl_train.batches import random_batch
from tests.skyrl_train.learner.test_critic import config_of as critics_config
from tests.skyrl_train.learner.test_critic import learner_of as critics_learner
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config
from tests.tiny_models import tiny_policy

CONFIG = trainer_config({"kl_loss_coef": 0.1}, update_ref_every_epoch=True)


class Disk(threading.Event):
    """It takes nothing before this event, or for so many seconds."""

    patience_s = 0.5  # where the learner waits for it


@pytest.fixture
def is_over(monkeypatch: pytest.MonkeyPatch) -> Disk:
    event, save_file = Disk(), saved.save_file

    def save_late(*args: Any) -> None:
        event.wait(event.patience_s)
        save_file(*args)

    monkeypatch.setattr(saved, "save_file", save_late)
    return event


def trained() -> TorchLearner:
    learner = learner_for(CONFIG, reference=tiny_policy(seed=1))
    learner.update(prepared(learner, CONFIG))
    return learner


@pytest.mark.parametrize(
    "call",
    [TorchLearner.update, TorchLearner.add_logprobs, lambda learner, batch: learner.update_reference()],
    ids=["update", "add_logprobs", "update_reference"],
)
def test_what_is_written_is_of_its_own_step_whatever_the_learner_is_asked_meanwhile(call, is_over, tmp_path):
    learner = trained()
    parts = learner._optimizer.parts() | learner._reference_parts()
    before = {name: part.rows.clone() for name, part in parts.items()}
    batch = prepared(learner, CONFIG, random_batch(seed=1))
    future = learner.save(tmp_path)
    call(learner, batch)
    assert future.done()
    is_over.set()
    future.result()
    found = SavedLearner(tmp_path)
    assert found.plain["policy_version"] == 1
    assert found.shapes.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found.whole(name), tensor), name


def test_pushes_proofs_and_exports_do_not_wait_for_the_disk(is_over, tmp_path):
    is_over.patience_s = 60.0
    learner = trained()
    future = learner.save(tmp_path / "saved")
    learner.logprobs_of_tokens([1, 2, 3])
    learner.publish(tmp_path / "weights")
    assert not future.done()
    is_over.set()
    future.result()


def test_a_critic_is_written_meanwhile_too_and_its_update_waits(is_over, tmp_path):
    is_over.patience_s = 60.0
    config = critics_config()
    learner = critics_learner(config)
    learner.update(prepared(learner, config))
    assert learner._critic is not None
    before = {name: part.rows.clone() for name, part in learner._critic.to_save(tmp_path).parts.items()}
    batch = prepared(learner, config, random_batch(seed=1))
    future = learner.save(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    threading.Timer(0.2, is_over.set).start()
    learner.update(batch)
    assert future.done()
    found = SavedLearner(tmp_path / "critic")
    assert found.shapes.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found.whole(name), tensor), name


def test_an_error_of_the_disk_is_the_futures_and_the_learner_goes_on(tmp_path):
    learner = trained()
    (tmp_path / "file").touch()
    future = learner.save(tmp_path / "file" / "policy")
    learner.update(prepared(learner, CONFIG, random_batch(seed=1)))
    with pytest.raises(NotADirectoryError):
        future.result()
    assert learner.policy_version == 2
