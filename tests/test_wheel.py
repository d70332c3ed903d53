"""What ships: the built wheel, installed outside of the repository, trains from its own configs; and those are few."""

from __future__ import annotations

import difflib
import itertools
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.tiny_llm import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "src" / "orbit" / "configs"


def words(path: Path) -> list[str]:
    """What a config says, without its comments."""
    return [word for line in path.read_text("utf-8").splitlines() for word in line.split("#")[0].split()]


def test_the_configs_are_few_and_none_is_another_with_one_word_changed() -> None:
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert 0 < len(files) < 40
    for one, other in itertools.combinations(files, 2):
        if one.parent == other.parent:
            matcher = difflib.SequenceMatcher(None, words(one), words(other), autojunk=False)
            changed = [max(b - a, d - c) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal"]
            assert sum(changed) > 1, f"{one.name} differs from {other.name} by one word"


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_trains_and_merges(tmp_path: Path) -> None:
    """In a fresh environment that has this one's other packages, but not its Orbit."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", source], check=True
    )
    [wheel] = (tmp_path / "wheels").glob("orbit_torch-*.whl")

    home = tmp_path / "home"
    venv.create(home, with_pip=False, symlinks=True)
    subprocess.run([*pip, "--python", home / "bin" / "python", "install", "--no-deps", wheel], check=True)
    [packages] = (home / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(
        "\n".join(site.getsitepackages())
    )  # their own .pth files are not read

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tiny")
    tiny_llama(tokenizer).save_pretrained(tmp_path / "tiny")
    work = tmp_path / "work"
    work.mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def orbit(*arguments: str) -> str:
        done = subprocess.run(
            [home / "bin" / "orbit", *arguments], cwd=work, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    model = f"model.model_args.pretrained_model_name_or_path={tmp_path / 'tiny'}"
    trained = orbit("train", "experiment=sft", model, "trainer.args.max_steps=2", "run_name=first")
    assert "runs/sft/first" in trained
    assert (work / "runs/sft/first/adapters/default/adapter_model.safetensors").is_file()
    assert "QADataset" in orbit("list", "datasets")
    orbit("merge", "runs/sft/first", "--out", "merged")
    assert sorted(path.name for path in work.iterdir()) == ["merged", "runs"]
    where = [home / "bin" / "python", "-c", "import orbit; print(orbit.__file__)"]
    found = subprocess.run(where, cwd=work, env=clean, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(packages)
