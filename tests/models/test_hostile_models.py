"""Models that are damaged, unsupported or hostile: an error of one line, in bounded time."""

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from models import weights
from models.__main__ import main
from models.config import T5Config
from models.errors import ModelError, ModelNotFound
from models.model import Model
from models.weights import (
    flax_msgpack,
    huggingface,
    huggingface_config,
    huggingface_encoders,
    limits,
    safetensors_file,
    winnow,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SENTENCE_T5 = T5Config(
    vocab_size=64, d_model=16, d_ff=32, num_heads=2, d_kv=8, num_encoder_layers=2,
    num_decoder_layers=0, tie_embeddings=True, sentence_head=12,
)  # fmt: skip
HOSTILE = {
    "empty object": b"{}",
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "string": b'"x"',
    "nothing": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "msgpack": b"\xc1",
}


def zeros(model: Model):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.shapes())


def write(directory: Path, kind: str) -> None:
    """Write a sentence encoder in several files."""
    save = {"huggingface": huggingface.save, "winnow": winnow.save}[kind]
    model = Model(SENTENCE_T5)
    save(directory, model, zeros(model), max_file_bytes=5_000)


def error_lines(printed: str) -> int:
    """Return the number of lines, apart from that of a reading that takes long."""
    return sum(not line.startswith("reading ") for line in printed.splitlines())


def refusal(call, *arguments, seconds: float = 60) -> str:
    """Return the message of the ModelError that a call raises: one line, and in time."""
    started = time.monotonic()
    with pytest.raises(ModelError) as error:
        call(*arguments)
    assert time.monotonic() - started < seconds
    message = str(error.value)
    assert "\n" not in message and message.isprintable()
    assert len(message) < 1500
    return message


FILES = {
    "huggingface": (
        *("config.json", "model.safetensors.index.json", "modules.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("2_Dense/model.safetensors.digests", "model-00001-of-*.safetensors"),
    ),
    "winnow": (
        *("winnow_model.json", "model.safetensors.index.json"),
        *("model-00001-of-*.safetensors", "model-00001-of-*.safetensors.digests"),
    ),
}


@pytest.mark.parametrize(
    ("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files]
)
def test_hostile_content_is_refused_by_name(tmp_path, kind, file):
    """Of each file of a model, the message names it or its directory; a directory likewise."""
    write(tmp_path, kind)
    weights.load(tmp_path)
    (path,) = tmp_path.glob(file)
    for content in HOSTILE.values():
        path.write_bytes(content)
        assert path.parent.name in refusal(weights.load, tmp_path)
    path.unlink()
    path.mkdir()
    message = refusal(weights.load, tmp_path)
    assert f"{path} is a directory, and a file is expected" in message


@pytest.mark.parametrize("file", ["_METADATA", "checkpoint"])
def test_hostile_indexes_of_t5x_are_refused(tmp_path, file):
    for name, content in HOSTILE.items():
        (tmp_path / file).write_bytes(content)
        if file == "checkpoint":
            assert str(tmp_path) in refusal(weights.load, tmp_path), name
        else:
            assert "_METADATA" in refusal(weights.load, tmp_path), name
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    refusal(weights.load, tmp_path)


# --------------------------------------------------------------------------------------------------
# Configurations

VALUES = (None, [], {}, "x", True, 0, -1, 10**9, 10**30, float("inf"), float("nan"), 0.5, [[1]])
TINY = {
    "t5": {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
           "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "architectures": []},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    **{
        kind: {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "eos_token_id": 1, "sliding_window": 8, "use_sliding_window": True,
            "max_window_layers": 2, "rope_scaling": None, "rope_parameters": None,
            "layer_types": None, "rope_local_base_freq": 1e4, "hidden_activation": None,
        }
        for kind in ("llama", "qwen3", "gemma3_text")
    },
    **{
        kind: {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 64, "layer_types": None,
            "rope_parameters": None, "relative_attention": True, "pos_att_type": ["c2p"],
            "architectures": ["XForSequenceClassification"], "id2label": {"0": "a", "1": "b"},
            "problem_type": None, "num_labels": 2, "classifier_pooling": "mean",
            "pooler_hidden_size": 32, "embedding_size": 32, "attention_head_size": 8,
        }
        for kind in ("bert", "modernbert", "deberta-v2")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", TINY)
def test_any_value_of_any_field_is_read_or_refused(kind):
    """A configuration comes out, with fields in bounds, or a ModelError; nothing else."""
    names = {
        **huggingface_config._DEFAULTS.get(kind, huggingface_config._T5_DEFAULTS),
        **huggingface_encoders.DEFAULTS.get(kind, {}),
        **TINY[kind],
    }
    read = 0
    started = time.monotonic()
    for name in names:
        for value in VALUES:
            settings = {"model_type": kind, **TINY[kind], name: value}
            try:
                config = huggingface_config.from_json(settings)
            except ModelError:
                continue
            assert limits.checked(config) == config
            Model(config).shapes()  # what is accepted can be built
            read += 1
    assert read
    assert time.monotonic() - started < 300


def test_unsupported_architectures_are_refused_with_the_list_of_supported_ones(tmp_path, capsys):
    for settings in ({"model_type": "mamba"}, {"model_type": ["t5"]}, {"architectures": ["X"]}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        message = refusal(weights.load, tmp_path)
        assert f"{tmp_path / 'config.json'}: model_type" in message
        for kind in huggingface_config.MODEL_TYPES:
            assert kind in message
    assert main(["inspect", str(tmp_path)]) == 1
    assert error_lines(capsys.readouterr().err) == 1


# --------------------------------------------------------------------------------------------------
# Limits


def test_a_billion_layers_are_refused_at_once(tmp_path):
    for kind in ("llama", "gemma3_text", "qwen3", "gpt2", "t5"):
        settings = {"model_type": kind, **TINY[kind]}
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in settings:
                with pytest.raises(ModelError, match="over the limit of 1024"):
                    huggingface_config.from_json(settings | {name: 10**9})
    config = SENTENCE_T5.to_dict() | {"num_encoder_layers": 10**9}
    (tmp_path / "winnow_model.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "over the limit of 1024 layers" in refusal(weights.load, tmp_path, seconds=10)


def test_a_header_of_many_tensors_is_refused(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    entry = b':{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for count, message in ((1_500_000, "over the limit"), (300_000, "names 300,000 tensors")):
        header = b"{" + b",".join(b'"%d"%b' % (i, entry) for i in range(count)) + b"}"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert message in refusal(safetensors_file.read_file, path)


def test_a_msgpack_of_many_values_is_refused(tmp_path):
    path = epath.Path(tmp_path / "checkpoint")
    path.write_bytes(b"\xdd" + (50_000_000).to_bytes(4, "big") + b"\xc0" * 50_000_000)
    assert "more than 1,000,000 values" in refusal(flax_msgpack.read_file, path)
    path.write_bytes(b"\x91" * 100_000)
    assert "nested more than 64 deep" in refusal(flax_msgpack.read_file, path)
    path.write_bytes(b"\xdb\xff\xff\xff\xff")
    assert "a text of 4,294,967,295 bytes" in refusal(flax_msgpack.read_file, path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b", "..", "a\\b", ""])
def test_an_index_cannot_name_files_outside_of_its_directory(tmp_path, name):
    write(tmp_path, "huggingface")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], name)
    index.write_text(json.dumps(values))
    assert "not in its own directory" in refusal(weights.load, tmp_path)


def test_headers_that_lie_are_refused(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    for entry in (
        {}, [], None, {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": "22", "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
    ):  # fmt: skip
        header = json.dumps({"x": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        assert str(path) in refusal(safetensors_file.read_file, path)


def test_names_of_tensors_do_not_reach_the_terminal_raw(tmp_path):
    write(tmp_path, "huggingface")
    safetensors.numpy.save_file({"\x1b[2J\nx": np.ones(3, np.float32)}, tmp_path / "evil")
    values = {"weight_map": {"\x1b[2J\nx": "evil"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(values))
    assert r"\x1b[2J" in refusal(weights.load, tmp_path)


# --------------------------------------------------------------------------------------------------
# Places


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://google/flan-t5-xl", r"give a model of the Hugging Face hub as owner/model"),
        ("https://huggingface.co/google/flan-t5-xl", r"not read over https://; give a local dir"),
        ("ftp://a/b", r"not read over ftp://"),
        ("s3://no-such-bucket-at-all/model", r"s3://no-such-bucket-at-all/model cannot be reached"),
        ("/no/such/model", r"no model at /no/such/model"),
    ],
)
def test_places_that_are_not_read_are_named(path, message):
    with pytest.raises(ModelError, match=message):
        weights.load(path)


def test_an_unreadable_path_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    assert "no model at" in refusal(weights.load, tmp_path / "file")
    assert str(tmp_path / "file") in refusal(weights.load, tmp_path / "file" / "below")


# --------------------------------------------------------------------------------------------------
# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of the hub that a download uses, for a repository with a pickle only."""

    files = ("config.json", "pytorch_model.bin")

    def do_GET(self):
        content = b'{"model_type": "t5"}'
        if self.path.startswith("/api/"):
            listed = [{"rfilename": name} for name in self.files]
            tree = [{"type": "file", "path": n, "size": 20, "oid": "0" * 40} for n in self.files]
            info = {"id": "owner/model", "sha": "a" * 40, "siblings": listed}
            content = json.dumps(tree if "/tree/" in self.path else info).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0123456789"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_repository_with_pickles_only_is_refused(tmp_path):
    pytest.importorskip("huggingface_hub", reason="it downloads from the hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-m", "models", "inspect", "owner/model"], cwd=REPOSITORY, text=True,
        capture_output=True, env=dict(os.environ) | hub | {"HF_HUB_OFFLINE": "0", "no_proxy": "*"},
    )  # fmt: skip
    server.shutdown()
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: owner/model holds pytorch_model.bin and no safetensors"), last
    assert "Traceback" not in found.stderr


# --------------------------------------------------------------------------------------------------
# Conversion


def test_overflow_of_float16_is_refused(tmp_path, capsys):
    """Published T5s have weights in bfloat16 whose values exceed 65,504."""
    model = Model(dataclasses.replace(SENTENCE_T5, sentence_head=None))
    params = zeros(model)
    params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"][1, 2, 3] = 7e4
    for kind, save in (("winnow", winnow.save), ("huggingface", huggingface.save)):
        save(tmp_path / kind, model, params)
        options = ["convert", "--from", str(tmp_path / kind), "--to", str(tmp_path / f"{kind}16")]
        assert main([*options, "--format", "winnow", "--dtype", "float16"]) == 1
        error = capsys.readouterr().err
        assert "beyond the range of float16 (65,504)" in error
        assert error_lines(error) == 1
        with pytest.raises(ModelError, match="use bfloat16 or float32"):
            weights.load(tmp_path / kind, dtype="float16")
        weights.load(tmp_path / kind, dtype="bfloat16")


def test_a_missing_model_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        weights.load(tmp_path)
    assert issubclass(ModelNotFound, FileNotFoundError)
