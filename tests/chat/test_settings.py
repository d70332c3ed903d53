"""Settings: from programs and as typed."""

import math

import pytest

from orbit.chat import ChatError, Settings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1),
        ("top_p", ".9", 0.9),
        ("top_k", "40", 40),
        ("seed", "0", 0),
        ("seed", "off", None),
        ("repetition_penalty", "1.3", 1.3),
        ("max_new_tokens", "5", 5),
        ("max_new_tokens", "off", 256),
        ("stop", "User:", ("User:",)),
        ("stop", "7", ("7",)),
        ("stop", '"\\n\\n"', ("\n\n",)),
        ("stop", '["a b", "c"]', ("a b", "c")),
        ("stop", "off", ()),
    ],
)
def test_what_is_typed(name, text, value):
    before = Settings(seed=3, stop=("x",), max_new_tokens=9)
    after = before.changed(name, text)
    assert getattr(after, name) == value
    others = vars(before).keys() - {name}
    assert all(getattr(after, other) == getattr(before, other) for other in others)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("temperatur", "1", "did you mean 'temperature'"),
        ("x", "1", "there are temperature, top_p"),
        ("temperature", "-1", "from 0 up"),
        ("temperature", "hot", "temperature='hot' must be a number"),
        ("temperature", "nan", "must be a number"),
        ("temperature", "inf", "must be a number"),
        ("top_p", "0", "above 0 and up to 1"),
        ("top_p", "1.5", "above 0 and up to 1"),
        ("top_k", "-1", "whole number from 0 up"),
        ("top_k", "1.5", "whole number from 0 up"),
        ("repetition_penalty", "0", "above 0"),
        ("max_new_tokens", "0", "from 1 up"),
        ("max_new_tokens", "1e3", "whole number from 1 up"),
        ("seed", "-1", "from 0 up"),
        ("seed", "99999999999999999999999", "from 0 up"),
        ("stop", '""', "not empty"),
        ("stop", '["a", 1]', "not empty"),
        ("stop", '"a', "is no JSON"),
        ("stop", "", "not empty"),
    ],
)
def test_what_is_refused(name, text, why):
    with pytest.raises(ChatError, match=why):
        Settings().changed(name, text)


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": True}, {"temperature": math.nan}, {"seed": 1.0}, {"stop": ("a", "")}, {"temperature": "1"}],
)
def test_programs_are_held_to_the_same(wrong):
    with pytest.raises(ChatError, match=next(iter(wrong))):
        Settings(**wrong)


def test_one_stop_string_or_a_list_are_a_tuple():
    assert Settings(stop="User:").stop == ("User:",)
    assert Settings(stop=["a", "b"]) == Settings(stop=("a", "b"))


def test_what_generate_is_told():
    assert Settings().arguments() == {"max_new_tokens": 256, "repetition_penalty": 1.0, "do_sample": False}
    assert Settings(temperature=2, top_p=0.5, top_k=3).arguments() == {
        "max_new_tokens": 256,
        "repetition_penalty": 1.0,
        "do_sample": True,
        "temperature": 2.0,
        "top_p": 0.5,
        "top_k": 3,
    }


def test_shown():
    shown = str(Settings(stop=("\n", "é"))).splitlines()
    assert shown[0] == "temperature 0.0"
    assert shown[-2:] == ["seed off", 'stop ["\\n", "é"]']
