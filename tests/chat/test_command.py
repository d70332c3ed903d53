"""`orbit chat MODEL --adapter FOLDER`: what is asked for, and what is refused."""

import pytest

from orbit import adapter, cli
from tests.chat.test_interface import strong_task
from tests.tiny_llm import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, seed in (("one", 1), ("two", 2)):
        strong_task(model, name, seed)
        adapter.save(model, folder / name, name=name)
    return folder


@pytest.fixture
def typing(monkeypatch):
    def types(*lines):
        left = iter([*lines, "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(left))

    return types


@pytest.mark.parametrize("model", [["model"], ["--model", "model"]], ids=" ".join)
def test_one_model_and_several_adapters(folder, monkeypatch, typing, capsys, model):
    monkeypatch.chdir(folder)
    typing("/adapter", "/compare one second hello")
    adapters = ["--adapter", "one", "--adapter", "second=two"]
    assert cli.main(["chat", *model, *adapters, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "(answering with one; there are one, second)" in said
    assert said.index("[one]") < said.index("[second]")


def test_two_models_are_one_too_many(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", "one", "--model", "two"])
    assert stopped.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_an_adapter_that_is_not_there(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["chat", "model", "--adapter", "one", "--adapter", "x=nowhere", "--device", "cpu"]) == 1
    assert "orbit chat: adapter 'x=nowhere' is neither a folder" in capsys.readouterr().err
