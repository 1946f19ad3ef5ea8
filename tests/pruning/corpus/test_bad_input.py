"""Bad input, one kind after another: an error that names file, row and mend, or a count by reason.

Each is met where a user meets it, at the command line.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pruning.cli.main import main
from pruning.corpus.reader import Corpus, load_corpus
from pruning.store.artifact import require_same_documents
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

GOOD = [json.dumps({"text": f"A good document, number {i}."}).encode() for i in range(50)]


@pytest.fixture
def ingest(tmp_path, small_vocabulary_file, capsys):
    """Runs `ingest` on the bytes of one file; returns the status, what it said, and the output."""

    def run(
        content: bytes, *bindings: str, name: str = "file.jsonl", output: Path = tmp_path / "corpus"
    ) -> tuple[int, str, Path]:
        (tmp_path / name).write_bytes(content)
        return *command(
            capsys,
            "ingest",
            "--gin_file=configs/ingest/jsonl.gin",
            f"--gin.FILES={tmp_path / name}",
            f"--gin.VOCABULARY={small_vocabulary_file}",
            f"--gin.OUTPUT={output}",
            "--gin.Ingest.workers=1",
            *bindings,
        ), output

    return run


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])


def command(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(arguments)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if not line.startswith("ingest: ")]
    return status, "\n".join(errors)


def counts(path: Path) -> dict:
    return load_corpus(path).artifact.manifest.counts


# 1 ------------------------------------------------------------------------------------------------


def test_truncated_gzip(ingest):
    packed = gzip.compress(b"\n".join(GOOD * 500), compresslevel=1)
    cut = packed[: len(packed) // 2]
    status, said, output = ingest(cut, name="cut.jsonl.gz")
    assert status == 1
    assert "cut.jsonl.gz is cut off" in said and "in row " in said
    assert "Fetch the file again, or set Ingest.on_truncated=keep" in said
    status, said, output = ingest(cut, "--gin.Ingest.on_truncated=keep", name="cut.jsonl.gz")
    assert status == 0 and not said
    assert counts(output)["files"]["cut_off"] == 1
    assert 0 < counts(output)["documents"] < 25_000


# 2 ------------------------------------------------------------------------------------------------


def test_invalid_utf8(ingest):
    lines = GOOD * 3
    lines[60] = b'{"text": "caf\xe9"}'
    status, _, output = ingest(b"\n".join(lines))
    assert status == 0
    assert counts(output)["dropped"] == {"invalid_utf8": 1} and counts(output)["documents"] == 149
    for row in range(10, 20):
        lines[row] = b'{"text": "caf\xe9"}'
    status, said, _ = ingest(b"\n".join(lines), output=output.with_name("other"))
    assert status == 1
    assert "file.jsonl, row 11: it is not UTF-8" in said and "Convert the file to UTF-8" in said
    assert "11 of 150 rows are malformed" in said and "max_bad_fraction" in said


# 3, 4, 5 ------------------------------------------------------------------------------------------


def test_empty_files(ingest, tmp_path, small_vocabulary_file, capsys):
    status, said, _ = ingest(b"")
    assert status == 1 and "no document is left of 0 rows" in said
    (tmp_path / "many").mkdir()
    for name, content in (("a.jsonl", b""), ("b.jsonl", GOOD[0]), ("c.jsonl.gz", b"")):
        (tmp_path / "many" / name).write_bytes(content)
    status, said, output = ingest(
        b"", f"--gin.FILES={tmp_path / 'many'}", output=tmp_path / "of_many"
    )
    assert status == 0
    assert counts(output)["files"] == {"read": 3, "empty": 2, "cut_off": 0}


def test_empty_and_enormous_documents(ingest):
    lines = [*GOOD, b'{"text": ""}', b'{"text": " \\n "}', b"", b'{"text": "\\u200b"}']
    lines.append(json.dumps({"text": "ten megabytes " * 750_000}).encode())
    status, said, output = ingest(b"\n".join(lines))
    assert status == 1 and "2 of 55 (3.6%) rows and 10,500,003 of 10,5" in said
    assert "set Ingest.max_document_bytes higher" in said
    status, _, output = ingest(b"\n".join(lines), "--gin.Ingest.max_lost_fraction=1")
    assert status == 0
    dropped = {"empty": 2, "blank_line": 1, "no_tokens": 1, "too_long": 1}
    assert counts(output)["dropped"] == dropped and counts(output)["documents"] == 50
    status, _, output = ingest(
        b"\n".join(lines),
        "--gin.Ingest.max_document_bytes=20000000",
        "--gin.Ingest.max_lost_fraction=2%",
        output=output.with_name("all"),
    )
    assert status == 0 and "too_long" not in counts(output)["dropped"]
    longest = load_corpus(output).columns(0, ["n_bytes"])["n_bytes"].to_pylist()[-1]
    assert longest == 14 * 750_000


# 6 ------------------------------------------------------------------------------------------------


def test_json_without_the_text_field(ingest):
    status, said, _ = ingest(b'{"url": "u", "body": "some text"}\n' * 30)
    assert status == 1
    assert "file.jsonl, row 1: it has no text under 'text'; it has: body, url" in said
    assert "Set JsonlSource.text_field" in said
    status, _, output = ingest(b'{"url": "u", "body": "some text"}\n' * 30, "--gin.TEXT_FIELD=body")
    assert status == 0 and counts(output)["documents"] == 30


def test_rows_are_given_up_before_a_large_file_ends(ingest):
    """With the wrong field name nobody wants to wait for the end of a terabyte."""
    lines = b'{"body": "x"}\n' * 200_000
    status, said, _ = ingest(lines)
    assert status == 1 and "101 of 101 rows are malformed" in said


# 7 ------------------------------------------------------------------------------------------------


def test_the_wrong_vocabulary(ingest, small_vocabulary_file, tmp_path, capsys):
    import jax

    from models import weights
    from models.config import T5Config
    from models.model import Model
    from pruning.corpus.vocabulary_training import train

    _, _, output = ingest(b"\n".join(GOOD))
    corpus = load_corpus(output)
    other = train(["other words of another language altogether, ja und nein"] * 20, 26)
    (tmp_path / "other.model").write_bytes(other)

    # A judge with a vocabulary of its own, which lacks the answers.
    config = T5Config(
        vocab_size=corpus.vocabulary.size,
        d_model=8,
        d_ff=8,
        num_heads=1,
        d_kv=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    model = Model(config)
    weights.save(tmp_path / "m", model, model.init(jax.random.key(0)), tmp_path / "other.model")
    score = (
        "score",
        "--gin_file=configs/score/ask_llm.gin",
        f"--gin.CORPUS={output}",
        f"--gin.MODEL={tmp_path / 'm'}",
        f"--gin.OUTPUT={tmp_path / 'scores'}",
        "--gin.Score.compilation_cache=None",
    )
    status, said = command(capsys, *score)
    assert status == 1
    assert "'yes' is not a single token" in said  # of the model's own vocabulary

    # A vocabulary file that was exchanged inside the corpus.
    (output / "vocabulary.model").write_bytes(other)
    status, said = command(capsys, *score)
    assert status == 1
    assert "its manifest says" in said and "the file was changed" in said

    # A file that is no vocabulary.
    (tmp_path / "no.model").write_bytes(b"nonsense")
    status, said, _ = ingest(
        GOOD[0], f"--gin.VOCABULARY={tmp_path / 'no.model'}", output=tmp_path / "x"
    )
    assert status == 1 and "no.model is not a SentencePiece model" in said
    assert not (tmp_path / "x").exists()


# 8 ------------------------------------------------------------------------------------------------


def test_a_half_written_shard(ingest, capsys):
    """Left by a killed process it is not taken for whole; cut later on it is found and named."""
    _, _, output = ingest(b"\n".join(GOOD))
    whole = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    shard = output / "data-00000-of-00001.parquet"
    # As after a kill: no manifest, no record, half a file under its temporary and its final name.
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").unlink()
    (output / "unfinished").mkdir()
    plan = {"kind": "corpus", "format": 1, "config": manifest["config"], "inputs": {}, "shards": 1}
    (output / "unfinished" / "plan.json").write_text(json.dumps(plan))
    half = whole[shard.name][: len(whole[shard.name]) // 2]
    shard.write_bytes(half)
    (output / f".{shard.name}.1234.tmp").write_bytes(half)
    status, _, _ = ingest(b"\n".join(GOOD))
    assert status == 0
    again = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    del whole["measured.json"], again["measured.json"]
    assert again == whole

    shard.write_bytes(half)
    status, said = command(capsys, "inspect", str(output), "--verify")
    assert status == 1 and f"{shard.name} is damaged" in said
    status, said = command(
        capsys,
        "export",
        "--gin_file=configs/export.gin",
        f"--gin.CORPUS={output}",
        f"--gin.OUTPUT={output}_dataset",
    )
    assert status == 1
    assert f"{shard.name} is damaged" in said and "Delete this file" in said


# 9 ------------------------------------------------------------------------------------------------


def test_an_unknown_gin_macro(ingest, tmp_path, capsys):
    status, said, output = ingest(b"\n".join(GOOD), "--gin.VOCABULRY=x")
    assert status == 1
    assert "nothing uses the macro 'VOCABULRY' (did you mean 'VOCABULARY'?)" in said
    (tmp_path / "mine.gin").write_text("Ingest.workers = %WORKERS\n")
    status, said = command(
        capsys,
        "ingest",
        "--gin_file=configs/ingest/jsonl.gin",
        f"--gin_file={tmp_path / 'mine.gin'}",
    )
    assert status == 1 and "the macro 'WORKERS' is used but not set" in said
    status, said, _ = ingest(b"\n".join(GOOD), "--gin.Ingest.worker=2")
    assert status == 1 and "worker" in said
    status, said = command(capsys, "ingest", "--gin_file=configs/ingest/jsonl.gin", "FILES=x")
    assert status == 1 and "a setting is written --name=VALUE or --gin.NAME=VALUE" in said
    assert not output.exists()


# 10 -----------------------------------------------------------------------------------------------


def write_scores(path: Path, corpus: Corpus) -> None:
    schema = pa.schema([("doc_id", pa.int64()), ("status", pa.string()), ("nll", pa.float32())])
    build = Build(path, "scores", {}, {"corpus": corpus.artifact}, corpus.num_shards, schema)
    for shard in range(corpus.num_shards):
        doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        with build.shard(shard) as writer:
            writer.write(
                {
                    "doc_id": doc_ids,
                    "status": ["ok"] * len(doc_ids),
                    "nll": np.arange(len(doc_ids), dtype=np.float32),
                }
            )
    build.finish({"columns": {"nll": "sum of the tokens' negative log-likelihood"}})


def test_scores_of_another_corpus(ingest, tmp_path, capsys):
    _, _, one = ingest(b"\n".join(GOOD))
    _, _, other = ingest(b"\n".join(GOOD[:40]), output=tmp_path / "other")
    write_scores(tmp_path / "scores", load_corpus(one))
    (tmp_path / "select.gin").write_text("Select.strategy = @Top()\n")
    for stage, setting in (
        ("select", "--gin.Select.keep_tokens=0.5"),
        ("export", "--gin.Export.workers=1"),
    ):
        name = stage.capitalize()
        files = [f"--gin_file={tmp_path / 'select.gin'}"] if stage == "select" else []
        status, said = command(
            capsys,
            stage,
            *files,
            f"--gin.{name}.corpus={other}",
            f"--gin.{name}.scores={tmp_path / 'scores'}",
            f"--gin.{name}.output={tmp_path / stage}",
            setting,
            *(["--gin.Select.score=column:nll"] if stage == "select" else []),
        )
        assert status == 1
        assert f"{tmp_path / 'scores'} was made from the corpus at {one}" in said
        assert f"not from {other}" in said and "Give the corpus that belongs to it" in said
    with pytest.raises(ArtifactError, match="row 1: document 5 stands where the corpus"):
        require_same_documents(np.array([4, 6]), np.array([4, 5]), "scores/data-0")


# 11 -----------------------------------------------------------------------------------------------


def test_output_below_a_file(ingest, tmp_path):
    (tmp_path / "taken").write_text("a file")
    status, said, _ = ingest(b"\n".join(GOOD), output=tmp_path / "taken" / "corpus")
    assert status == 1
    assert "taken/corpus cannot be created" in said and "that you may write to" in said
    status, said, _ = ingest(b"\n".join(GOOD), output=tmp_path)
    assert status == 1 and "is not empty and not an artifact" in said


def test_files_that_may_not_grow(ingest, tmp_path):
    """A limit on the size of files, which any user can set, instead of a full disk."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": rng.bytes(300).hex()}).encode() for _ in range(2000)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / "file.jsonl").write_bytes(b"\n".join(lines))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        # the input is there already; writing it again would meet the limit
        status, said, output = ingest(b"", f"--gin.FILES={_copied(tmp_path)}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1
    assert "cannot write" in said and "data-00000-of-00001.parquet" in said
    assert "run the same command again" in said
    assert [path.name for path in output.iterdir()] == ["unfinished"]
    status, _, output = ingest(b"", f"--gin.FILES={_copied(tmp_path)}")
    assert status == 0 and counts(output)["documents"] == 2000
    load_corpus(output).artifact.verify()


def _copied(directory: Path) -> Path:
    """The input under a name that the fixture does not write to."""
    kept = directory / "kept.jsonl"
    if not kept.exists():
        (directory / "file.jsonl").rename(kept)
    return kept


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(ingest, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        rng = np.random.default_rng(0)
        lines = [json.dumps({"text": rng.bytes(300).hex()}).encode() for _ in range(2000)]
        status, said, output = ingest(b"\n".join(lines), output=disk / "corpus")
        assert status == 1
        assert "No space left on device" in said and "data-00000-of-00001.parquet" in said
        assert "make room or give another output, and run the same command again" in said
        assert [path.name for path in output.iterdir()] == ["unfinished"]
        subprocess.run(["mount", "-o", "remount,size=20M", str(disk)], check=True)
        status, _, output = ingest(b"\n".join(lines), output=disk / "corpus")
        assert status == 0 and counts(output)["documents"] == 2000
    finally:
        subprocess.run(["umount", str(disk)], check=True)
