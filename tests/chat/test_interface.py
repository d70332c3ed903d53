"""ChatInterface on a tiny model: what programs get, and what a typist sees."""

import io
import re

import pytest
import torch

from orbit import adapter
from orbit.chat import ChatInterface
from orbit.data import encode, render
from tests.tiny_llm import tiny_llama, tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer)


@pytest.fixture
def chat(model, tokenizer):
    return ChatInterface(model=model, tokenizer=tokenizer, max_new_tokens=6)


def greedy(model, tokenizer, messages, count=6):
    """The reply by a loop of argmax, without generate."""
    ids = encode(tokenizer, render(tokenizer, messages, add_generation_prompt=True))
    start = len(ids)
    while len(ids) < start + count:
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def strong_task(model, name, seed):
    """An adapter far from the base."""
    adapter.inject(model, adapter.AdapterConfig(r=4, alpha=64), name=name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.adapter_parameters(model, name).values():
            parameter.normal_()


def words(text):
    """With single spaces, since the tiny vocabulary has a line break for a word."""
    return " ".join(text.split())


def user(text):
    return {"role": "user", "content": text}


def test_respond_is_greedy_and_remembers(chat, model, tokenizer):
    first = chat.respond("hello")
    assert first == greedy(model, tokenizer, [user("hello")])
    history = [user("hello"), {"role": "assistant", "content": first}]
    assert chat.messages == history
    assert chat.respond("when") == greedy(model, tokenizer, [*history, user("when")])
    chat.reset()
    assert chat.respond("hello") == first


def test_a_system_message_opens_every_conversation(model, tokenizer):
    chat = ChatInterface(model=model, tokenizer=tokenizer, system="mali", max_new_tokens=6)
    wanted = greedy(model, tokenizer, [{"role": "system", "content": "mali"}, user("hello")])
    assert chat.respond("hello") == wanted
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "mali"}]


def test_text_is_streamed_piece_by_piece(chat):
    pieces = []
    reply = chat.respond("hello", on_text=pieces.append)
    assert "".join(pieces).split() == reply.split()
    assert len(pieces) > 2


def test_arguments_of_generate_pass(chat):
    torch.manual_seed(0)
    sampled = {chat.respond("hello", do_sample=True, temperature=5.0, max_new_tokens=4) for _ in range(4)}
    assert len(sampled) > 1


def test_the_model_is_left_in_the_mode_it_had(chat, model):
    model.train()
    chat.respond("hello")
    assert model.training


def test_a_failing_generate_reaches_the_caller_and_leaves_no_trace(chat, model):
    chat.respond("hello")
    before = list(chat.messages)

    def fail(module, args):
        raise RuntimeError("out of memory, say")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        chat.respond("when", on_text=lambda text: None)
    assert chat.messages == before
    hook.remove()


def test_typing(chat, model, tokenizer):
    out = io.StringIO()
    chat.interact(input=["hello\n", "\n", "/reset\n", "/what\n", "/quit\n", "never\n"], output=out)
    text = words(out.getvalue())
    assert words(greedy(model, tokenizer, [user("hello")])) in text
    assert "forgotten" in text
    assert "'/what' is no command" in text
    assert chat.messages == []


def test_the_end_of_input_and_ctrl_c_leave(chat):
    def interrupted():
        yield "hello"
        raise KeyboardInterrupt

    chat.interact(input=[], output=io.StringIO())
    chat.interact(input=interrupted(), output=io.StringIO())
    assert len(chat.messages) == 2


@pytest.mark.parametrize("how", [EOFError, KeyboardInterrupt])
def test_at_the_terminal_ctrl_d_and_ctrl_c_leave(chat, monkeypatch, capsys, how):
    typed = iter(["hello"])

    def typing(prompt):
        for line in typed:
            return line
        raise how

    monkeypatch.setattr("builtins.input", typing)
    chat.interact()
    assert words(chat.messages[1]["content"]) in words(capsys.readouterr().out)


def test_ctrl_c_in_a_reply_leaves_without_half_a_turn(chat, model):
    def interrupt(module, args):
        raise KeyboardInterrupt

    model.lm_head.register_forward_pre_hook(interrupt)
    chat.interact(input=["hello"], output=io.StringIO())
    assert chat.messages == []


def test_adapters_by_name_and_off(model, tokenizer):
    base = greedy(model, tokenizer, [user("hello")])
    strong_task(model, "one", seed=1)
    chat = ChatInterface(model=model, tokenizer=tokenizer, max_new_tokens=6)
    assert chat.adapter == "one"
    adapted = chat.respond("hello")
    assert adapted == greedy(model, tokenizer, [user("hello")]) != base
    out = io.StringIO()
    typed = ["/adapter off", "/reset", "hello", "/adapter one", "/reset", "hello", "/adapter nine"]
    chat.interact(input=typed, output=out)
    said = re.fullmatch(
        r".* \(answering with the base model\) \(.*forgotten\) (.*) "
        r"\(answering with one\) \(.*forgotten\) (.*) \(adapter 'nine' is neither .*\)",
        words(out.getvalue()),
    )
    assert said.groups() == (words(base), words(adapted))
    assert chat.adapter == "one"


def test_a_merged_adapter_answers(model, tokenizer):
    strong_task(model, "a", 1)
    adapter.merge(model)
    chat = ChatInterface(model=model, tokenizer=tokenizer, max_new_tokens=6)
    assert chat.adapter == "a"
    assert chat.respond("hello") == greedy(model, tokenizer, [user("hello")])
    chat.use_adapter(None)
    with pytest.raises(adapter.RouteError, match="merged"):
        chat.respond("hello")


def test_an_adapter_folder(model, tokenizer, tmp_path):
    strong_task(model, "one", seed=1)
    adapter.save(model, tmp_path / "saved", name="one")
    wanted = greedy(model, tokenizer, [user("hello")])
    fresh = tiny_llama(tokenizer)
    chat = ChatInterface(model=fresh, tokenizer=tokenizer, adapter=tmp_path / "saved", max_new_tokens=6)
    assert chat.respond("hello") == wanted
    chat.use_adapter(None)
    chat.use_adapter(tmp_path / "saved")
    assert list(adapter.tasks(fresh)) == [str(tmp_path / "saved")]


def test_model_id_loads_model_and_tokenizer(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat = ChatInterface(model_id=tmp_path, device="cpu", max_new_tokens=6)
    assert chat.respond("hello") == greedy(model, tokenizer, [user("hello")])
    assert chat.device.type == "cpu"


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        (lambda m, t: {}, ValueError, "either a model or a model_id"),
        (
            lambda m, t: {"model": m, "model_id": "x", "tokenizer": t},
            ValueError,
            "either a model or a model_id",
        ),
        (lambda m, t: {"model": m}, ValueError, "needs its tokenizer"),
        (lambda m, t: {"model": torch.nn.Linear(1, 1), "tokenizer": t}, TypeError, "no generate"),
        (lambda m, t: {"model": m, "tokenizer": t, "device": "abacus"}, ValueError, "names no device"),
        (lambda m, t: {"model": m, "tokenizer": t, "adapter": "nowhere"}, ValueError, "'nowhere' is neither"),
    ],
)
def test_what_is_missing_is_named(model, tokenizer, given, error, why):
    with pytest.raises(error, match=why):
        ChatInterface(**given(model, tokenizer))
