"""The model of a run as a folder: written at the end, and from any checkpoint by `skyrl export`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from skyrl_train.commands.main import main
from skyrl_train.learner.ranks import Ranks, rows_of
from skyrl_train.learner.saved import Part, SavedLearner, write_rank
from skyrl_train.ops import ops_for
from skyrl_train.run.digests import write_digests
from skyrl_train.run.saved_run import read_run

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def of_the_learner(run: Path, step: int) -> dict[str, torch.Tensor]:
    return weights(run / "exports" / f"global_step_{step}" / "policy")


def test_a_run_ends_with_the_model_of_its_last_step_in_bfloat16(run):
    assert {path.name for path in (run / "model").iterdir()} >= FILES
    rounded = ops_for(torch.device("cpu"), torch.bfloat16).rounded
    ours = weights(run / "model")
    base = weights(run.parent / "model")
    for name, weight in of_the_learner(run, 2).items():
        assert ours[name].dtype == torch.bfloat16
        if run.name == "full":
            assert torch.equal(ours[name], rounded(weight, torch.bfloat16)), name
        torch.testing.assert_close(ours[name].float(), weight, rtol=0.02, atol=0.01)
    assert any(not torch.equal(ours[name].float(), base[name].bfloat16().float()) for name in ours)
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_the_summary_names_the_model_and_its_size(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model_folder"] == str(run / "model")
    assert summary["model_bytes"] == sum(path.stat().st_size for path in (run / "model").rglob("*") if path.is_file())


@pytest.mark.parametrize("step", [1, 2])
def test_an_export_of_any_checkpoint_is_what_the_learner_would_have_written(run, step, tmp_path, capsys):
    words = ["export", str(run), "--output", str(tmp_path / "out"), "--step", str(step), "--dtype", "float32", "--json"]
    assert main(words) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["folder"], done["step"], done["kind"]) == (str(tmp_path / "out"), step, "model")
    ours, theirs = weights(tmp_path / "out"), of_the_learner(run, step)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert (tmp_path / "out/chat_template.jinja").read_text() == (run.parent / "model/chat_template.jinja").read_text()


def test_the_exported_model_computes_in_transformers_as_the_learners_does_and_not_as_the_base(run):
    ids = torch.arange(20)[None]
    folders = (run / "model", run / "exports/global_step_2/policy", run.parent / "model")
    with torch.no_grad():
        ours, theirs, base = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in folders
        )
    assert (ours - theirs).abs().mean() < (base - theirs).abs().mean() / 3


def test_the_adapters_alone_are_those_of_the_learner_and_a_whole_model_has_none(runs, tmp_path, capsys):
    words = ["--adapter", "--dtype", "float32", "--output", str(tmp_path / "a")]
    assert main(["export", str(runs["lora"]), *words]) == 0
    theirs = runs["lora"] / "exports/global_step_2/policy/adapter"
    assert json.loads((tmp_path / "a/adapter_config.json").read_text()) == json.loads(
        (theirs / "adapter_config.json").read_text()
    )
    ours = load_file(tmp_path / "a/adapter_model.safetensors")
    for name, adapter in load_file(theirs / "adapter_model.safetensors").items():
        assert torch.equal(ours[name], adapter), name
    assert main(["export", str(runs["full"]), "--adapter"]) == 2
    assert "has no adapter" in capsys.readouterr().err


def test_a_gguf_file_holds_the_model_of_the_folder_and_its_tokenizer(run, tmp_path, capsys):
    file = tmp_path / "a.gguf"
    assert main(["export", str(run), "--format", "gguf", "--output", str(file), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["folder"], done["kind"], done["dtype"]) == (str(file), "GGUF model", "bfloat16")
    assert done["num_bytes"] == file.stat().st_size
    source: Any = {"pretrained_model_name_or_path": tmp_path, "gguf_file": file.name}
    quantized = GgufConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(**source, quantization_config=quantized, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    of_file: Any = AutoTokenizer.from_pretrained(**source)
    of_folder: Any = AutoTokenizer.from_pretrained(run / "model")
    told: list[Any] = [{"role": "user", "content": "It's 1234 → ☃"}]
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    assert of_file.apply_chat_template(told, **how) == of_folder.apply_chat_template(told, **how)
    assert main(["export", str(run), "--format", "gguf", "--output", str(file), "--dtype", "q8_0"]) == 0  # over it


def test_a_checkpoint_of_two_ranks_gives_the_same_model(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run / "global_step_2", copied / "global_step_2")
    policy = copied / "global_step_2" / "policy"
    saved = SavedLearner(policy)
    whole = {name: saved.whole(name) for name in saved.shapes}
    shutil.rmtree(policy)
    for rank in range(2):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 2
        parts = {}
        for name, tensor in whole.items():
            first, stop = rows_of(tensor.shape[0], rank, 2)
            parts[name] = Part(tensor[first:stop], tuple(tensor.shape))
        write_rank(policy, parts, saved.plain, ranks)
    (copied / "global_step_2" / "digests.txt").unlink()
    write_digests(copied / "global_step_2", "# skyrl checkpoint, format 3")
    assert sorted(path.name for path in policy.iterdir())[1:] == ["rank_0_of_2.safetensors", "rank_1_of_2.safetensors"]
    assert main(["export", str(copied)]) == 0  # a stopped run: nothing but a checkpoint
    ours, theirs = weights(copied / "model"), weights(run / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_that_is_not_the_runs_own_is_refused(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs["lora"].parent / "model", other)
    assert main(["export", str(runs["lora"]), "--base", str(other), "--output", str(tmp_path / "out")]) == 0
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert main(["export", str(runs["lora"]), "--base", str(other), "--output", str(tmp_path / "out")]) == 2
    assert "is not the model that the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere is no run: there is no such folder"),
        (["empty"], "empty is no run: it holds no checkpoint"),
        (["begun"], "has no checkpoint, so its model was not kept"),
        (["run", "--step", "7"], "has no checkpoint of step 7; it has 1, 2"),
        (["run", "--output", "full"], "full holds other files"),
        (["damaged"], "digests.txt is missing. No checkpoint before it is whole"),
        (["later"], "digests.txt is missing. global_step_1 before it is whole: add --step 1"),
        (["only"], "has no checkpoint any more; its model is in only/model"),
        (["run/report.html"], "run/report.html is no run: it is a file. It belongs to the run in"),
        (["run/model"], "run/model is a run's exported model, without a checkpoint. It belongs to the run in"),
        (["run/trajectories"], "run/trajectories is no run: it holds no checkpoint. It belongs to the run in"),
        (["run", "--output", "run/model/again"], "lies in the exported model"),
        (["run", "--output", "run/global_step_2/model"], "global_step_2, which would be damaged"),
        (
            ["run", "--output", "run/global_step_2/a/b.gguf", "--format", "gguf"],
            "global_step_2, which would be damaged",
        ),
        (["run", "--output", "full/thesis.tex/model"], "thesis.tex is a file"),
        (["run", "--output", "full/thesis.tex"], "thesis.tex is a file; give a folder"),
        (["run", "--format", "gguf", "--adapter"], "choose one"),
        (["run", "--dtype", "q8_0"], "is for --format gguf"),
        (["run", "--format", "gguf", "--output", "full"], "full is a folder; a GGUF model is one file"),
        (["run", "--format", "gguf", "--output", "full/thesis.tex"], "is another file"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(runs, words, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "damaged" / "global_step_1").mkdir(parents=True)
    (tmp_path / "damaged" / "global_step_1" / "a").touch()
    (tmp_path / "run").symlink_to(runs["full"])
    shutil.copytree(runs["full"] / "model", tmp_path / "only" / "model")
    (tmp_path / "only" / "run.json").write_text("{}")
    shutil.copytree(runs["full"] / "global_step_1", tmp_path / "later" / "global_step_1")
    (tmp_path / "later" / "global_step_3" / "policy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    refused = capsys.readouterr().err
    assert says in refused
    assert refused.count("\n") == 1
    assert main(["export", *words, "--json"]) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert not list(tmp_path.rglob("*.writing"))


def test_a_checkpoints_own_folder_is_a_run_at_that_step(run):
    assert read_run(run / "global_step_1").step == 1


def test_a_finished_run_writes_no_model_again_and_makes_one_that_is_missing(runs, tmp_path):
    from tests.skyrl_train.commands.conftest import settings

    run = runs["full"]
    again = settings(run.parent, run, "full")
    written = (run / "model" / "skyrl.json").stat().st_mtime_ns
    assert main(["train", *again]) == 0
    assert (run / "model" / "skyrl.json").stat().st_mtime_ns == written
    shutil.move(run / "model", tmp_path / "model")
    assert main(["train", *again, "trainer.save_model=false"]) == 0
    assert not (run / "model").exists()
    assert main(["train", *again]) == 0
    assert weights(run / "model").keys() == weights(tmp_path / "model").keys()
