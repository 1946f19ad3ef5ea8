"""The wheel: what it installs is enough to work away from a clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the sources and unpack it; return the directory."""
    pytest.importorskip("setuptools", minversion="77")
    root = tmp_path_factory.mktemp("wheel")
    sources = root / "sources"
    sources.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((REPOSITORY / name).read_bytes())
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    made = subprocess.run(
        [sys.executable, "-c", build], cwd=sources, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "installed")
    return root / "installed"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """Return a directory with modules whose names are those of Winnow's."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "train.py").write_text("raise RuntimeError('not this one')\n")
    return tmp_path


def winnow(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the console command, with the installed packages alone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["JAX_NUM_CPU_DEVICES"] = "-1"  # the number that users have
    code = "import sys; from winnow import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}",
         *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_every_tracked_data_file_of_a_package_is_in_the_wheel(installed):
    packages = ("configs", "evaluation", "models", "pruning", "tpu")
    missing = [
        str(file.relative_to(REPOSITORY))
        for package in packages
        for file in (REPOSITORY / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
        if not (installed / file.relative_to(REPOSITORY)).is_file()
    ]
    assert missing == []


def test_stages_run_away_from_a_clone(installed, elsewhere):
    (elsewhere / "text").mkdir()
    for index in range(40):
        (elsewhere / "text" / f"{index}.txt").write_text(f"Document {index} of a corpus. " * 9)
    common = ("--gin.VOCABULARY=bytes", "--gin.OUTPUT=corpus")
    made = winnow(
        installed, elsewhere, "ingest", "--gin_file=configs/ingest/text.gin", "--gin.FILES=text",
        *common,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    chosen = winnow(
        installed, elsewhere, "select", "--gin_file=configs/select/random.gin",
        "--gin.CORPUS=corpus", "--gin.KEEP=0.5", "--gin.OUTPUT=selection",
    )  # fmt: skip
    assert chosen.returncode == 0, chosen.stderr
    trained = winnow(
        installed, elsewhere, "train", "--gin_file=configs/pretrain/t5_tiny.gin",
        "--gin.CORPUS=corpus", "--gin.SELECTION=selection", "--gin.VALIDATION=corpus",
        "--gin.OUTPUT=run", "--gin.STEPS=1", "--gin.Train.eval_batches=1",
        "--gin.T5Config.d_model=32", "--gin.T5Config.d_ff=64", "--gin.T5Config.num_heads=2",
        "--gin.Stream.batch_size=4",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (elsewhere / "run" / "result.json").exists()
    assert (installed / "pruning" / "cli" / "status_page.css").is_file()


def test_programs_of_tpu_run_away_from_a_clone(installed, elsewhere):
    wrong = winnow(
        installed, elsewhere, "compile", "--topology=v5e:3x3", "--model=flan_t5_xl",
        "--program=ask_llm", "--batch=9",
    )  # fmt: skip
    assert wrong.returncode == 2 and "no such v5e slice" in wrong.stderr
    cloud = ("queued-resource", "--stage=setup", "--project=p", "--zone=z")
    launched = winnow(installed, elsewhere, "launch", *cloud)
    assert launched.returncode == 2 and "not a git checkout" in launched.stderr


def test_a_command_that_does_not_exist_is_refused_with_those_that_do(installed, elsewhere):
    wrong = winnow(installed, elsewhere, "prune")
    assert wrong.returncode == 2
    assert "no command 'prune'" in wrong.stderr and "  select " in wrong.stderr


def test_the_console_command_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"winnow": "winnow:main"}


@pytest.mark.parametrize("module", ["pruning", "evaluation"])
def test_modules_of_the_user_that_hide_ours_are_refused(installed, elsewhere, module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "hides Winnow's module 'models'" in done.stderr
