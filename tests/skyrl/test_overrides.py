"""A subclass that overrides what nobody calls is refused before anything is loaded, with the name to use instead."""

from __future__ import annotations

from typing import Any

import pytest

from skyrl_train.config import load_config
from skyrl_train.entrypoints.main_base import BasePPOExp
from skyrl_train.entrypoints.overrides import NEVER_CALLED
from skyrl_train.vain_overrides import vain_overrides
from tests.tiny_models import save_tiny_model


def refusal(**methods) -> str:
    experiment = type("MyExp", (BasePPOExp,), methods)
    with pytest.raises(ValueError) as caught:
        experiment(load_config([]))
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(NEVER_CALLED))
def test_skyrls_methods_that_nobody_calls_are_refused_with_what_to_do(name):
    text = refusal(**{name: lambda self, *args: None})
    assert text == f"MyExp.{name} is never called: {NEVER_CALLED[name]}"
    hooks = [word.partition("(")[0] for word in NEVER_CALLED[name].split() if word.startswith("get_")]
    assert all(hasattr(BasePPOExp, hook) for hook in hooks)


def test_a_parents_override_is_found_and_all_are_told_at_once():
    class Mixin:
        def get_colocate_pg(self, timeout=180): ...

    class Parent(Mixin, BasePPOExp):
        def _setup_trainer(self): ...

    class Child(Parent):
        pass

    with pytest.raises(ValueError) as caught:
        Child(load_config([]))
    first, second = str(caught.value).splitlines()
    assert first.startswith("test_a_parents_override_is_found_and_all_are_told_at_once.<locals>.Parent._setup_trainer")
    assert "Mixin.get_colocate_pg is never called: trainer.placement and its like alone say" in second


def test_a_method_of_skyrls_that_the_users_own_methods_call_is_the_users_own():
    class Calling(BasePPOExp):
        def get_tracker(self):
            return super().get_tracker()  # ty: ignore[missing-attribute]

        def setup_trainer(self):
            return self.get_tracker()

    says = list(vain_overrides(Calling, BasePPOExp, NEVER_CALLED))
    assert [sentence.partition(" is never called")[0].rpartition(".")[2] for sentence in says] == [
        "get_tracker",
        "setup_trainer",
    ]
    called: Any = Calling
    called.extra_metrics = lambda self: self.get_tracker()
    assert [
        sentence.partition(" is never")[0].rpartition(".")[2]
        for sentence in vain_overrides(Calling, BasePPOExp, NEVER_CALLED)
    ] == ["setup_trainer"]


@pytest.mark.parametrize(
    ("name", "meant"), [("get_tokeniser", "get_tokenizer"), ("get_train_dataet", "get_train_dataset")]
)
def test_a_misspelt_hook_is_told_the_one_that_was_meant(name, meant):
    assert refusal(**{name: lambda self: None}) == f"MyExp.{name} is never called; did you mean {meant}?"


def test_skyrls_signature_where_ours_differs_is_refused():
    text = refusal(get_train_dataset=lambda self, sources: None)
    assert text.startswith("MyExp.get_train_dataset(self, sources) cannot be called: it is given (self), and there ")
    assert text.endswith("missing a required argument: 'sources'")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (lambda self, **given: None, None),
        (lambda self, *, cfg, tracker, **others: None, None),
        (lambda self, *args, **kwargs: None, None),
        (staticmethod(lambda **given: None), None),
        (lambda self, *args: None, "got an unexpected keyword argument 'cfg'"),
        (lambda self, config, **others: None, "missing a required argument: 'config'"),
    ],
)
def test_get_trainer_is_called_with_keywords(method, says):
    problems = list(vain_overrides(type("MyExp", (BasePPOExp,), {"get_trainer": method}), BasePPOExp, NEVER_CALLED))
    assert len(problems) == (says is not None)
    assert all(says in problem for problem in problems)


@pytest.mark.parametrize("name", ["get_generator", "get_trainer", "extra_metrics"])
def test_a_coroutine_that_nobody_awaits_is_refused(name):
    async def method(self, *args, **kwargs): ...

    says = f"MyExp.{name} is written with `async def`, and nobody awaits it; write it with `def`"
    assert refusal(**{name: method}) == says


@pytest.mark.parametrize("name", ["run", "shape_rewards", "close"])
def test_what_is_awaited_may_be_a_coroutine_or_not(name):
    async def method(self, *args): ...

    for function in (method, lambda self, *args: None):
        cls = type("MyExp", (BasePPOExp,), {name: function})
        assert list(vain_overrides(cls, BasePPOExp, NEVER_CALLED)) == []


def test_a_method_of_skyrls_that_is_called_says_what_to_do():
    class GenerateExp(BasePPOExp):
        def __init__(self):
            pass

    with pytest.raises(
        AttributeError, match=r"no attribute 'get_inference_client': override get_engine\(policy\).*Eval"
    ):
        GenerateExp().get_inference_client()  # ty: ignore[missing-attribute]
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        GenerateExp().nothing  # noqa: B018  # ty: ignore[missing-attribute]


@pytest.mark.parametrize("wrong", [{}, 3, None])
def test_a_hook_that_is_no_method_is_refused(wrong):
    assert "MyExp.extra_metrics must be a method" in refusal(extra_metrics=wrong)


def test_what_is_called_and_methods_of_ones_own_are_welcome(tmp_path):
    class MyExp(BasePPOExp):
        color = "blue"

        def get_tokenizer(self, padding_side="left"):
            tokenizer = super().get_tokenizer(padding_side)
            assert tokenizer.padding_side == padding_side
            return self.get_tokenizr()

        def get_tokenizr(self):  # close to a hook, but called
            raise OSError("reached")

        @staticmethod
        def extra_metrics():
            return {}

        async def close(self): ...

        def score(self): ...

    save_tiny_model(tmp_path)
    config = load_config([f"trainer.policy.model.path={tmp_path}", "trainer.device=cpu"])
    MyExp.get_model_path = lambda self: str(tmp_path)
    with pytest.raises(OSError, match="reached"):
        MyExp(config)
