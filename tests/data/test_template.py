"""Chat templates: which tokens the model says, with and without a template of the tokenizer's own."""

import pytest
from transformers import AddedToken

from orbit.data.template import TemplateError, encode, encode_turns, render
from tests.tiny_llm import TEMPLATE, tiny_tokenizer

ASK = [{"role": "user", "content": "hello"}]
TALK = [*ASK, {"role": "assistant", "content": "mali"}]
LONG = [*TALK, {"role": "user", "content": "what"}, {"role": "assistant", "content": "bamako"}]


def said(tokenizer, messages, **kwargs):
    ids, ranges = encode_turns(tokenizer, messages, **kwargs)
    return [tokenizer.convert_ids_to_tokens(ids[a:b]) for a, b in ranges]


def test_the_model_says_the_answer_and_the_end_mark_but_not_what_follows():
    tokenizer = tiny_tokenizer()
    ids, [(start, stop)] = encode_turns(tokenizer, TALK)
    assert said(tokenizer, TALK) == [["mali", "<end>"]]
    assert ids[:start] == encode(tokenizer, render(tokenizer, ASK, add_generation_prompt=True))
    assert tokenizer.convert_ids_to_tokens(ids[stop:]) == ["\n"]


def test_every_turn_of_the_model_in_a_conversation():
    assert said(tiny_tokenizer(), LONG) == [["mali", "<end>"], ["bamako", "<end>"]]


@pytest.mark.parametrize("messages", [TALK, LONG])
def test_fallback_where_the_tokenizer_has_no_template(messages):
    tokenizer = tiny_tokenizer(template=None)
    text = render(tokenizer, messages)
    assert text.startswith("User: hello\nAssistant: mali<end>\n")
    assert render(tokenizer, ASK, add_generation_prompt=True) == "User: hello\nAssistant:"
    assert said(tokenizer, messages)[0] == ["mali", "<end>"]


def test_end_is_appended_where_the_template_marks_none():
    bare = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    assert said(tiny_tokenizer(template=bare), TALK) == [["mali", "\n", "<end>"]]


def test_an_end_mark_that_is_neither_eos_nor_named():
    tokenizer = tiny_tokenizer(TEMPLATE.replace("<end>", "<stop>"))
    tokenizer.add_tokens([AddedToken("<stop>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<stop>") not in tokenizer.all_special_ids
    assert said(tokenizer, TALK) == [["mali", "<stop>"]]


def test_a_word_that_the_tokenizer_does_not_know_is_no_end_mark():
    tokenizer = tiny_tokenizer()
    messages = [*ASK, {"role": "assistant", "content": "zanzibar"}]
    assert said(tokenizer, messages) == [["<unk>", "<end>"]]


def test_a_template_that_rewrites_the_past_is_refused():
    rewriting = TEMPLATE.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}")
    with pytest.raises(TemplateError, match=r"message 1 .* part at character \d+.*hello"):
        encode_turns(tiny_tokenizer(template=rewriting), TALK)


def test_a_model_that_speaks_first_is_refused():
    with pytest.raises(TemplateError, match="begins with a turn of 'assistant'"):
        encode_turns(tiny_tokenizer(), LONG[1:])


def test_a_token_across_the_border_is_said():
    """A tokenizer that merges the prompt's end with the answer's beginning: the prompt is what both share."""
    tokenizer = tiny_tokenizer(
        template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} <end>{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant ba{% endif %}",
        extra=("ba",),
    )
    assert said(tokenizer, [*ASK, {"role": "assistant", "content": "bamako"}]) == [["bamako", "<end>"]]
