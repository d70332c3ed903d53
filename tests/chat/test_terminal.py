"""A conversation as somebody types it."""

import io
import itertools
import re

import pytest

from orbit import adapter
from orbit.chat import ChatInterface
from orbit.model import Transformer, TransformerConfig
from tests.chat.test_interface import strong_task
from tests.tiny_llm import tiny_llama, tiny_tokenizer


@pytest.fixture
def chat():
    tokenizer = tiny_tokenizer()
    return ChatInterface(model=tiny_llama(tokenizer), tokenizer=tokenizer, max_new_tokens=6)


def typed(chat, *lines):
    """What is answered to each line, without the greeting; white space as single spaces."""
    out, answers = io.StringIO(), []

    def typing():
        for line in lines:
            answers.append(out.getvalue())
            yield line
        answers.append(out.getvalue())

    chat.interact(input=typing(), output=out)
    texts = [after.removeprefix(before) for before, after in itertools.pairwise(answers)]
    return [" ".join(text.split()) for text in texts]


def words(text):
    return " ".join(text.split())


def test_messages_are_answered_and_empty_lines_are_not(chat):
    answers = typed(chat, "hello", "", "when")
    assert answers == [words(chat.messages[1]["content"]), "", words(chat.messages[3]["content"])]


def test_messages_of_many_lines(chat):
    typed(chat, "hello \\", "mali", '"""', "/what is", "  the capital ?", '"""')
    assert chat.messages[0]["content"] == "hello \nmali"
    assert chat.messages[2]["content"] == "/what is\n  the capital ?"


def test_quit_leaves(chat):
    assert typed(chat, "/reset", "/quit", "hello") == ["(the conversation is forgotten)"]
    assert chat.messages == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/what", "('/what' is no command: /help lists them)"),
        ("/sav x", "('/sav x' is no command; did you mean '/save'?: /help lists them)"),
        ("/reset now", "('/reset now': write it as /reset)"),
        ("/set temperature", "('/set temperature': write it as /set NAME VALUE)"),
        (
            "/set temperature hot",
            "(temperature='hot' must be a number from 0 up; 0 takes the likeliest token)",
        ),
        ("/set heat 1", "(there is no setting 'heat'; there are temperature, top_p, "),
        ("/compare one", "('/compare one': write it as /compare A B [QUESTION])"),
        (
            "/compare one off",
            "(adapter 'one' is neither a folder with adapter_config.json nor a loaded task ",
        ),
        ("/compare off base", "(there is no turn yet: say something first)"),
        ("/undo", "(there is no turn yet: say something first)"),
        ("/retry", "(there is no turn yet: say something first)"),
        ("/adapter nine", "(adapter 'nine' is neither a folder"),
        ("/load nowhere.json", "([Errno 2] No such file or directory: 'nowhere.json')"),
        ("/save nowhere/chat.json", "([Errno 2] No such file or directory: "),
        ("/save", "('/save': write it as /save FILE)"),
        ("/load .", "([Errno 21] Is a directory: '.')"),
    ],
)
def test_what_is_typed_wrong_is_answered(chat, line, why):
    before = chat.settings
    [answer, reply] = typed(chat, line, "hello")
    assert answer.startswith(why)
    assert answer.endswith(")")
    assert reply == words(chat.messages[1]["content"]), "the chat goes on"
    assert chat.settings == before


def test_help_names_every_command(chat):
    [text] = typed(chat, "/help")
    named = re.findall(r"(?<!\S)/\w+", text)
    assert {"/help", "/quit", "/compare", "/set", "/settings", "/save", "/load", "/system"} <= set(named)
    assert '"""' in text


def test_settings(chat):
    first, second, third, _, fourth = typed(
        chat, "/settings", "/set temperature 0.7", '/set stop ["a b"]', "/set seed 7", "/set stop off"
    )
    assert "temperature 0.0 top_p 1.0" in first
    assert "temperature 0.7" in second
    assert 'stop ["a b"]' in third
    assert "seed 7 stop off" in fourth
    assert (chat.settings.temperature, chat.settings.seed, chat.settings.stop) == (0.7, 7, ())


def test_undo_retry_and_the_system_message(chat):
    shown, cleared, reply, again, undone, system = typed(
        chat, "/system be brief", "/system off", "hello", "/retry", "/undo", "/system"
    )
    assert (shown, cleared, system) == (
        "(system message: be brief)",
        "(no system message)",
        "(no system message)",
    )
    assert reply == again
    assert undone == "(the last turn is forgotten; the conversation has 0 messages)"


def test_save_and_load(chat, tmp_path):
    path = tmp_path / "my chat.json"
    answers = typed(chat, "hello", f"/save {path}", "/reset", f"/load {path}", "/retry")
    assert answers[1] == f"(saved to {path})"
    assert answers[3] == "(loaded; the conversation has 2 messages)"
    assert answers[4] == answers[0]


def test_adapters(chat):
    base = chat.respond("hello")
    chat.reset()
    strong_task(chat.model, "one", seed=1)
    strong_task(chat.model, "my task", seed=2)
    which, off, reply, _, one, adapted, sides, asked = typed(
        chat,
        "/adapter",
        "/adapter off",
        "hello",
        "/reset",
        "/adapter one",
        "hello",
        '/compare one "my task"',
        "/compare off one hello",
    )
    assert which == "(answering with the base model; there are one, my task)"
    assert off == "(answering with the base model)"
    assert reply == words(base)
    assert one == "(answering with one)"
    assert sides.startswith(f"[one] {adapted} [my task] ")
    assert len(chat.messages) == 2
    assert asked.startswith("[off] ")


def test_a_merged_adapter_is_an_answer(chat):
    strong_task(chat.model, "a", 1)
    adapter.merge(chat.model)
    [_, refused] = typed(chat, "/adapter off", "hello")
    assert "merged" in refused


def test_ctrl_c_stops_a_reply_and_keeps_the_chat(chat):
    chat.respond("hello")
    before = list(chat.messages)
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    chat.model.lm_head.register_forward_pre_hook(interrupt)
    stopped, reply = typed(chat, "when", "hello")
    assert stopped.endswith("(stopped; the conversation is as it was before)")
    assert len(stopped.split()) > 9, "what was said so far is shown"
    assert chat.messages[:2] == before
    assert [message["content"] for message in chat.messages[2::2]] == ["hello"]
    assert reply


@pytest.mark.parametrize(
    ("events", "replies"),
    [
        (["hello", EOFError, "when"], 1),
        (["hello", KeyboardInterrupt, "when", KeyboardInterrupt, KeyboardInterrupt, "is"], 2),
        ([KeyboardInterrupt, KeyboardInterrupt, "hello"], 0),
        ([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "hello", EOFError], 1),
        (["one \\", KeyboardInterrupt, "hello", EOFError], 1),
    ],
)
def test_leaving_a_terminal(chat, monkeypatch, capsys, events, replies):
    left = iter(events)

    def typing(prompt):
        event = next(left)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", typing)
    chat.interact()
    assert len(chat.messages) == 2 * replies
    assert "Traceback" not in capsys.readouterr().out


def test_what_the_model_raises_is_passed_on(chat):
    def fail(module, args):
        raise RuntimeError("out of memory, say")

    chat.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        chat.interact(input=["hello"], output=io.StringIO())


def test_a_conversation_too_long_for_the_model_is_answered():
    tokenizer = tiny_tokenizer()
    model = Transformer(TransformerConfig(len(tokenizer), 16, num_layers=1, num_heads=2, max_length=12))
    chat = ChatInterface(model=model, tokenizer=tokenizer, max_new_tokens=100)
    refused, reply = typed(chat, "hello " * 12, "hello")
    assert "leaves no room in the model's max_length 12" in refused
    assert reply
    assert len(chat.messages) == 2
