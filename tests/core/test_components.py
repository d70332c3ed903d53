"""Components: by decorator, by call, built in, or from an installed package; unknown names name the nearest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orbit.core.components import ComponentError, Components


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A third party's package, installed: a module and the metadata that pip leaves."""
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[orbit.dataset]\nTheirs = their_module:Theirs\nGone = their_module:Gone\nNumber = their_module:NUMBER\n"
    )
    (tmp_path / "their_module.py").write_text(
        'NUMBER = 3\n\nclass Theirs:\n    """Their rows."""\n    def __init__(self, rows: int = 2): ...\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("their_module", None)


def test_what_an_installed_package_offers_is_imported_when_it_is_asked_for(offered: Path) -> None:
    datasets = Components("dataset", {"Ours": "fractions:Fraction"})
    assert list(datasets) == ["Gone", "Number", "Ours", "Theirs"]
    assert "Theirs" in datasets
    assert "their_module" not in sys.modules
    assert datasets["Theirs"].__doc__ == "Their rows."
    assert datasets.describe("Theirs") == ("Their rows.", "(rows=2)")
    with pytest.raises(
        ComponentError, match="dataset 'Gone' of their-package cannot be imported from their_module:Gone"
    ):
        datasets["Gone"]
    with pytest.raises(ComponentError, match="'Number' of their-package is a int"):
        datasets["Number"]
    assert "Theirs" not in Components("collator")


def test_what_is_registered_goes_before_what_is_offered(offered: Path) -> None:
    datasets = Components("dataset")
    datasets.add("Theirs", dict)
    assert datasets["Theirs"] is dict
    assert list(datasets).count("Theirs") == 1


def test_an_own_name_is_only_replaced_where_that_is_said() -> None:
    datasets = Components("dataset", {"Ours": "fractions:Fraction"})
    assert datasets["Ours"].__name__ == "Fraction"
    with pytest.raises(ComponentError, match="'Ours' is Orbit's own dataset"):
        datasets.add("Ours", dict)
    datasets.add("Ours", dict, replace=True)
    assert datasets["Ours"] is dict


def test_what_cannot_be_registered_and_what_is_not() -> None:
    datasets = Components("dataset", {"Ours": "fractions:Fraction"})
    for name in ("", " x", 3):
        with pytest.raises(ComponentError, match="no name for a dataset"):
            datasets.add(name, dict)
    with pytest.raises(ComponentError, match="is a int: register a class or function"):
        datasets.add("x", 3)
    with pytest.raises(ComponentError, match="dataset 'Our' is not registered.*did you mean 'Ours'"):
        datasets["Our"]
    assert datasets.get("Our") is None
    assert datasets.get("Ours").__name__ == "Fraction"


def test_components_of_another_error() -> None:
    with pytest.raises(KeyboardError, match="no name for a key"):
        Components("key", error=KeyboardError).add("", dict)


class KeyboardError(ValueError): ...
