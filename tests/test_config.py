"""Configs: what is merged, overridden, refused and written back."""

from __future__ import annotations

import copy
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from orbit.config import DELETE, REPLACE, ConfigError, apply_overrides, load_config, merge, save_config


@pytest.fixture(autouse=True)
def in_the_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return file


# -- loading -----------------------------------------------------------------------------------------------------


def test_a_file_goes_over_its_parents_and_later_ones_over_earlier_ones():
    write("a.py", "config = {'lr': 0.1, 'net': {'depth': 2, 'width': 8}, 'hooks': ['log', 'save']}")
    write("b.py", "config = {'lr': 0.2, 'net': {'width': 16}}")
    write("sub/c.py", "parents = ['../a.py', '../b.py']\nconfig = {'net': {'drop': .5}, 'hooks': ['log']}")
    expected = {"lr": 0.2, "net": {"depth": 2, "width": 16, "drop": 0.5}, "hooks": ["log"]}
    assert load_config("sub/c.py") == expected
    write("sub/d.py", "parents = 'c.py'\nconfig = {'lr': 3}")
    assert load_config("sub/d.py") == expected | {"lr": 3}
    assert load_config(["a.py", "b.py"])["net"] == {"depth": 2, "width": 16}
    assert load_config(["b.py", "a.py"])["lr"] == 0.1


def test_yaml_and_json_are_merged_with_python():
    write("a.yaml", "lr: 0.1\nnet: {depth: 2}\n")
    write("b.json", json.dumps({"parents": "a.yaml", "net": {"width": 4}}))
    write("c.py", "parents = 'b.json'\nconfig = {'net': {'depth': 3}}")
    assert load_config("c.py") == {"lr": 0.1, "net": {"depth": 3, "width": 4}}


def test_yaml_knows_a_number_with_an_exponent():
    write("a.yaml", "numbers: [1e-3, 5E5, -1.5e3, 2.e+1, .5e1]\nwords: ['1e-3', e3, 1e, 1e3x]")
    found = load_config("a.yaml")
    assert found == {"numbers": [1e-3, 5e5, -1.5e3, 20.0, 5.0], "words": ["1e-3", "e3", "1e", "1e3x"]}
    assert all(type(value) is float for value in found["numbers"])


def test_delete_and_replace_in_a_file():
    write("a.py", "config = {'optimizer': {'type': 'sgd', 'lr': 1, 'momentum': .9}, 'old': 1}")
    write(
        "b.py",
        """
        from orbit.config import DELETE, REPLACE
        parents = "a.py"
        config = {"optimizer": REPLACE({"type": "adam"}), "old": DELETE, "never_there": DELETE}
        """,
    )
    assert load_config("b.py") == {"optimizer": {"type": "adam"}}


def test_functions_take_the_parameters_that_they_name():
    write("a.py", "def config(width=8, depth=2):\n    return {'net': [width] * depth}")
    write("b.py", "SCALE = 3\nparents = 'a.py'\ndef config(width=16, *, lr):\n    return {'lr': lr * SCALE}")
    assert load_config("b.py", {"lr": 1}) == {"net": [16, 16], "lr": 3}, "the child's default holds for both"
    assert load_config("b.py", {"lr": 1, "width": 4, "depth": 1})["net"] == [4]
    with pytest.raises(ConfigError, match=r"config\(\) needs params=\{'lr'"):
        load_config("b.py")
    with pytest.raises(ConfigError, match="no config takes a parameter 'widht'.*did you mean 'width'"):
        load_config("b.py", {"lr": 1, "widht": 4})


def test_a_python_file_outside_the_working_tree_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    foreign = write(
        "foreign/a.py",
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nconfig = {{'a': 1}}",
    ).resolve()
    plain = write("foreign/a.json", '{"a": 1}').resolve()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work/link.py").symlink_to(foreign)
    write("child.py", f"parents = {str(foreign)!r}\nconfig = {{}}")
    for path in (foreign, "link.py", "child.py", "../foreign/a.py"):
        with pytest.raises(ConfigError, match="outside the working tree.*trust=True"):
            load_config(path)
    assert not (tmp_path / "ran").exists()
    assert load_config(plain) == {"a": 1}, "data is no code"
    assert load_config("child.py", trust=True) == {"a": 1}
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no config file .*a.py"),
        ({"a.py": "parents = 'b.py'\nconfig = {}"}, "no config file .*b.py, a parent of .*a.py"),
        (
            {"a.py": "parents = 'b.py'\nconfig = {}", "b.py": "parents = 'a.py'\nconfig = {}"},
            "its own ancestor",
        ),
        ({"a.py": "confg = {}"}, "a.py has no `config`"),
        ({"a.py": "config = [1]"}, "its config is a list and must be a dict"),
        ({"a.py": "def config(): return 3"}, "its config is a int"),
        ({"a.py": "def config(**any): return {}"}, "its parameters must have names"),
        ({"a.py": "parents = 'b.txt'\nconfig = {}", "b.txt": ""}, "ends in .py, .yaml, .yml or .json"),
        ({"a.py": "parents = 'b.json'\nconfig = {}", "b.json": '{"a": '}, "b.json is no json"),
        ({"a.py": "parents = 'b.json'\nconfig = {}", "b.json": "[" * 100_000}, "b.json is no json"),
        ({"a.py": "parents = 'b.yaml'\nconfig = {}", "b.yaml": "a: [1"}, "b.yaml is no yaml"),
        (
            {"a.py": "parents = 'b.yaml'\nconfig = {}", "b.yaml": "a: !!python/object/apply:os.getcwd []"},
            "b.yaml is no yaml",
        ),
        ({"a.py": "parents = 'b.yaml'\nconfig = {}", "b.yaml": "- 1"}, "b.yaml holds a list"),
    ],
)
def test_what_is_no_config_is_refused(files: dict[str, str], message: str):
    for path, text in files.items():
        write(path, text)
    with pytest.raises(ConfigError, match=message):
        load_config("a.py")


def test_what_a_config_raises_is_passed_on():
    write("a.py", "config = {}[1]")
    with pytest.raises(KeyError):
        load_config("a.py")
    with pytest.raises(ConfigError, match="no file to load"):
        load_config([])


def test_merging_changes_neither_side():
    base: dict[str, Any] = {"a": {"x": [1]}, "b": 1}
    over = {"a": {"y": {"z": DELETE, "w": REPLACE([2])}}, "b": {"c": 1}}
    before = copy.deepcopy(base)
    merged = merge(base, over)
    assert merged == {"a": {"x": [1], "y": {"w": [2]}}, "b": {"c": 1}}, (
        "verbs below a new key are carried out too"
    )
    merged["a"]["x"].append(2)
    assert base == before


# -- overrides ---------------------------------------------------------------------------------------------------

CONFIG = {
    "a": {"b": [1, [2, 3], {"c": 4}], "x.y": 5},
    "hooks": ["log", "save"],
    "lr": 1,
}


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("lr=1e-3", ["lr"], 1e-3),
        ("lr=10_000", ["lr"], 10_000),
        ("lr = 2 ", ["lr"], 2),
        ("new=word", ["new"], "word"),
        ("new='1'", ["new"], "1"),
        ("new=True", ["new"], True),
        ("new=false", ["new"], False),
        ("new=null", ["new"], None),
        ("new=", ["new"], ""),
        ("new=[true, null, -1]", ["new"], [True, None, -1]),
        ("new={'k': false}", ["new"], {"k": False}),
        ("new=[wandb, log]", ["new"], ["wandb", "log"]),
        ("new=[1, (2, 'x')]", ["new"], [1, (2, "x")]),
        ("new={'k': 1.5}", ["new"], {"k": 1.5}),
        ("new=a=b", ["new"], "a=b"),
        ("new=runs/x-1", ["new"], "runs/x-1"),
        ("a.b[0]=9", ["a", "b", 0], 9),
        ("a.b[-1].c=9", ["a", "b", 2, "c"], 9),
        ("a.b[1][1]=9", ["a", "b", 1, 1], 9),
        ("a['x.y']=9", ["a", "x.y"], 9),
        ('a["x.y"]=9', ["a", "x.y"], 9),
        ("hooks+=wandb", ["hooks"], ["log", "save", "wandb"]),
        ("hooks-=log", ["hooks"], ["save"]),
        ("hooks[0]!=", ["hooks"], ["save"]),
        ("a.b[1]+=4", ["a", "b", 1], [2, 3, 4]),
    ],
)
def test_an_override(override: str, where: list[Any], value: Any):
    cfg = copy.deepcopy(CONFIG)
    expected: Any = copy.deepcopy(CONFIG)
    node = expected
    for step in where[:-1]:
        node = node[step]
    node[where[-1]] = value
    assert apply_overrides(cfg, [override]) is cfg
    assert cfg == expected
    found: Any = cfg
    for step in where:
        found = found[step]
    assert type(found) is type(value)


def test_deleting_a_key():
    cfg = copy.deepcopy(CONFIG)
    apply_overrides(cfg, ["a.b!=", "lr!="])
    assert cfg == {"a": {"x.y": 5}, "hooks": ["log", "save"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "write path=value"),
        ("=1", "write path=value"),
        ("--lr=1", "no dashes in front; write 'lr=1'"),
        ("a.c.d=1", "a has no key 'c'"),
        ("hoks+=x", "the config has no key 'hoks'; did you mean 'hooks'"),
        ("a.b[7]=1", r"a\.b is a list of 3, without \[7\]"),
        ("a.b.c=1", r"a\.b is a list of 3, without \['c'\]"),
        ("lr.x=1", "lr is a int, with nothing below it"),
        ("lr+=1", "lr is a int and no list"),
        ("hooks-=wandb", "'wandb' is not in hooks"),
        ("nope!=", "no key 'nope'"),
        ("lr!=3", "takes no value"),
        ("a..b=1", "is no step of a path"),
        ("a.b[x]=1", "is no step of a path"),
        ("new=" + "[" * 100_000, None),
    ],
)
def test_an_override_that_does_not_fit_changes_nothing(override: str, message: str | None):
    cfg = copy.deepcopy(CONFIG)
    if message is None:  # too deep for a literal: a string
        assert apply_overrides(cfg, [override])["new"] == override.removeprefix("new=")
        return
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides(cfg, ["lr=7", override])
    assert repr(override) in str(caught.value)
    assert cfg == CONFIG


# -- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".py", ".yaml", ".yml", ".json"])
def test_a_saved_config_loads_equal(suffix: str):
    cfg = {
        "lr": 1e-3,
        "big": 10**20,
        "text": "größe\n'quoted' \"twice\" : #",
        "none": None,
        "yes": True,
        "words": ["1e-3", "5E5", "true", "1.0"],
        "nested": {"list": [1, [2.5, {"deep": []}], "x"], "empty": {}},
    }
    assert load_config(save_config(cfg, f"runs/1/config{suffix}")) == cfg
    assert [p.name for p in Path("runs/1").iterdir()] == [f"config{suffix}"]


def test_python_holds_what_the_others_cannot():
    cfg = {"betas": (0.9, 0.999), "by_number": {1: "a"}}
    assert load_config(save_config(cfg, "a.py")) == cfg
    for name in ("a.json", "a.yaml"):
        with pytest.raises(ConfigError, match=r"betas = \(0.9, 0.999\) cannot be written"):
            save_config(cfg, name)
        with pytest.raises(ConfigError, match="by_number = .* cannot be written"):
            save_config({"by_number": {1: "a"}}, name)
        assert not Path(name).exists()


def test_a_key_that_would_name_other_files_is_refused():
    cfg = {"parents": "Ada"}
    assert load_config(save_config(cfg, "a.py")) == cfg
    for name in ("a.json", "a.yaml"):
        with pytest.raises(ConfigError, match="its key 'parents' would name other files"):
            save_config(cfg, name)


def test_a_value_that_no_file_holds_is_named_and_nothing_is_written():
    save_config({"kept": 1}, "a.py")
    with pytest.raises(ConfigError, match=r"net\.layers\[1\] = .*object.* cannot be written"):
        save_config({"net": {"layers": [1, object()]}}, "a.py")
    with pytest.raises(ConfigError, match="lr = nan cannot be written"):
        save_config({"lr": float("nan")}, "a.py")
    with pytest.raises(ConfigError, match="ends in .py"):
        save_config({}, "a.toml")
    assert load_config("a.py") == {"kept": 1}
    assert [p.name for p in Path().iterdir() if p.name != "__pycache__"] == ["a.py"]
