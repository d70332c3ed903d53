"""Conversations as files."""

import json

import pytest

from orbit.chat import ChatError
from orbit.chat.history import read_messages, write_messages

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, ANSWERED = {"role": "user", "content": "Où? \n日"}, {"role": "assistant", "content": ""}
WHOLE = [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED]


@pytest.mark.parametrize("messages", [[], [SYSTEM], WHOLE, WHOLE[1:]])
def test_what_is_written_is_read(tmp_path, messages):
    write_messages(tmp_path / "chat.json", messages)
    assert read_messages(tmp_path / "chat.json") == messages
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_a_bare_list_is_read_and_the_home_folder_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chat.json").write_text(json.dumps(WHOLE))
    assert read_messages("~/chat.json") == WHOLE
    write_messages("~/other.json", WHOLE)
    assert (tmp_path / "other.json").is_file()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"{}", "needs"),
        (b"3", "needs"),
        (b'{"messages": "hello"}', "needs"),
        (json.dumps([ASKED]), "message 0, the last, has no answer"),
        (json.dumps([SYSTEM, ASKED, ANSWERED, ASKED]), "message 3, the last, has no answer"),
        (json.dumps([ANSWERED]), "message 0 is of 'assistant', and must be of 'user'"),
        (json.dumps([ASKED, ASKED]), "message 1 is of 'user', and must be of 'assistant'"),
        (json.dumps([ASKED, ANSWERED, SYSTEM]), "message 2 is of 'system', and must be of 'user'"),
        (json.dumps([SYSTEM, SYSTEM]), "message 1 is of 'system'"),
        (json.dumps(["hello"]), "message 0 must be"),
        (json.dumps([{"role": "user"}]), "message 0 must be"),
        (json.dumps([{**ASKED, "tool": 1}]), "message 0 must be"),
        (json.dumps([ASKED, {"role": "assistant", "content": 3}]), "message 1 must be"),
        (b'[{"role": "user", "content": "\\ud800"}]', "message 0 must be"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, content, why):
    path = tmp_path / "chat.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ChatError, match=why) as refused:
        read_messages(path)
    assert str(path) in str(refused.value)


def test_a_file_too_large_is_not_read(tmp_path):
    with (tmp_path / "chat.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ChatError, match="68,157,440 bytes"):
        read_messages(tmp_path / "chat.json")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_messages(tmp_path / "chat.json", WHOLE)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write_messages(tmp_path / "chat.json", [])
    assert read_messages(tmp_path / "chat.json") == WHOLE
    assert len(list(tmp_path.iterdir())) == 1
