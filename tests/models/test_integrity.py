"""Damaged weights are noticed: flipped bits, cut and exchanged files, in every file of a model."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from models import checkpoints, weights
from models.__main__ import main
from models.config import T5Config
from models.errors import ModelError
from models.model import Model
from models.weights import digests, huggingface, safetensors_file, tokenizer_files, winnow

CONFIG = T5Config(
    vocab_size=64, d_model=16, d_ff=32, num_heads=2, d_kv=8, num_encoder_layers=2,
    num_decoder_layers=2,
)  # fmt: skip
MODEL = Model(CONFIG)


def random_params(seed: int = 0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), MODEL.shapes())


def write_winnow(directory: Path, seed: int = 0) -> None:
    """Write weights in several files, with a vocabulary of arbitrary bytes beside them."""
    vocabulary = directory.parent / "any.model"
    vocabulary.write_bytes(np.random.default_rng(1).bytes(5000))
    winnow.save(
        directory, MODEL, random_params(seed), vocabulary_file=vocabulary, max_file_bytes=20_000
    )


def write_huggingface(directory: Path, seed: int = 0) -> None:
    huggingface.save(directory, MODEL, random_params(seed), max_file_bytes=20_000)


def write_run(directory: Path, seed: int = 0) -> None:
    directory.mkdir()
    checkpoints.write_config(directory, CONFIG.to_dict())
    with checkpoints.Checkpoints(directory) as run:
        run.save(1, random_params(seed), {"count": jnp.zeros(())})


WRITERS = {"winnow": write_winnow, "huggingface": write_huggingface, "run": write_run}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def content_of(directory: Path) -> tuple:
    """Return all that a directory gives: configuration, parameters, vocabulary."""
    model, params = weights.load(directory)
    vocabulary = tokenizer_files.find_sentencepiece(epath.Path(directory))
    content = None if vocabulary is None else vocabulary.read_bytes()
    return model, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)], content


def weight_files(directory: Path, kind: str) -> list[Path]:
    """Return the files that are covered: all, less what other programs edit in `huggingface`."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    if kind == "huggingface":
        files = [file for file in files if "safetensors" in file.name]
    return files


@pytest.mark.parametrize("kind", WRITERS)
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, kind):
    """In each file of a model, at random positions."""
    WRITERS[kind](tmp_path / "whole")
    expected = content_of(tmp_path / "whole")
    random = np.random.default_rng(0)
    files = weight_files(tmp_path / "whole", kind)
    noticed = 0
    for trial in range(max(40, len(files))):
        file = files[trial % len(files)].relative_to(tmp_path / "whole")
        damaged = tmp_path / str(trial)
        shutil.copytree(tmp_path / "whole", damaged)
        if not (size := (damaged / file).stat().st_size):
            continue
        flip(damaged / file, int(random.integers(8 * size)))
        try:
            assert content_of(damaged) == expected, file
        except ModelError as error:
            noticed += 1
            assert "\n" not in str(error)
            assert str(damaged) in str(error)
            assert "copy" in str(error).lower() or "not supported" in str(error), error
        shutil.rmtree(damaged)
    assert noticed > 5


def test_the_message_names_the_file_and_a_command(tmp_path):
    write_winnow(tmp_path / "model")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    flip(file, 8 * file.stat().st_size - 5)
    message = rf"{file} is damaged: .*Copy both files again, or .*python -m models convert"
    with pytest.raises(ModelError, match=message):
        weights.load(tmp_path / "model")
    os.truncate(file, 1000)
    with pytest.raises(ModelError, match=f"{file} is damaged: it holds 1,000 bytes, and"):
        weights.load(tmp_path / "model")


def test_damage_is_not_converted(tmp_path, capsys):
    """Conversion reads each tensor when it writes it; the directory is then left unfinished."""
    write_winnow(tmp_path / "model")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    flip(file, 8 * file.stat().st_size - 5)
    options = ["--from", str(tmp_path / "model"), "--to", str(tmp_path / "to")]
    assert main(["convert", *options, "--format", "huggingface"]) == 1
    assert f"error: {file} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "to" / "config.json").exists()


def test_exchanged_and_missing_files_are_noticed(tmp_path):
    """A file of another model of the same shape, with its own digests, does not belong."""
    write_winnow(tmp_path / "a", seed=0)
    write_winnow(tmp_path / "b", seed=1)
    name = sorted((tmp_path / "a").glob("*.safetensors"))[1].name
    for file in (name, name + digests.SUFFIX):
        shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    with pytest.raises(ModelError, match=rf"{name}\.digests is damaged"):
        weights.load(tmp_path / "a")
    (tmp_path / "b" / (name + digests.SUFFIX)).unlink()
    with pytest.raises(ModelError, match=rf"{name}\.digests does not exist"):
        weights.load(tmp_path / "b")


def test_weights_of_before_digests_are_still_read(tmp_path):
    write_winnow(tmp_path / "model")
    expected = content_of(tmp_path / "model")
    for file in (tmp_path / "model").glob(f"*{digests.SUFFIX}"):
        file.unlink()
    settings = tmp_path / "model" / checkpoints.MODEL_FILE
    values = json.loads(settings.read_text())
    del values["digests"]
    settings.write_text(json.dumps(values))
    assert content_of(tmp_path / "model") == expected


def test_any_range_of_a_file_is_checked(tmp_path, monkeypatch):
    """Blocks end inside of tensors, and tensors inside of blocks."""
    monkeypatch.setattr(digests, "BLOCK_BYTES", 96)
    array = np.arange(20 * 30, dtype=np.float32).reshape(20, 30)
    pending = {
        name: safetensors_file.Pending(array.shape, array.dtype, lambda: array) for name in "abc"
    }
    path = epath.Path(tmp_path / "file")
    safetensors_file.write_file(path, pending)
    tensor = safetensors_file.read_file(path)["b"]
    for start, stop in ((0, 20), (3, 4), (19, 20), (7, 13)):
        out = np.empty((stop - start, 11), np.float32)
        tensor.copy_to(out, (slice(start, stop), slice(5, 16)))
        np.testing.assert_array_equal(out, array[start:stop, 5:16])
    at = tensor.regions[0][0] + 12 * 30 * 4
    flip(Path(path), 8 * at)
    tensor = safetensors_file.read_file(path)["b"]
    tensor.copy_to(np.empty((4, 30), np.float32), (slice(0, 4), slice(0, 30)))  # far from it
    with pytest.raises(ModelError, match="file is damaged: bytes "):
        tensor.copy_to(np.empty((4, 30), np.float32), (slice(10, 14), slice(0, 30)))


def test_digests_do_not_depend_on_how_a_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", 100)
    content = np.random.default_rng(0).bytes(1234)
    for name, step in (("at_once", 1234), ("in_parts", 77)):
        with (tmp_path / name).open("wb") as file:
            writer = digests.DigestingWriter(file)
            for start in range(0, len(content), step):
                writer.write(content[start : start + step])
        writer.save(epath.Path(tmp_path / name))
    at_once, in_parts = (
        dataclasses.asdict(digests.read_digests(epath.Path(tmp_path / name)))
        for name in ("at_once", "in_parts")
    )
    assert at_once.pop("path") != in_parts.pop("path")
    assert at_once == in_parts
    assert len(at_once["blocks"]) == 13
