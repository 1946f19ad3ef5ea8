"""The engine: every document once, with the score of a plain model, however the work was cut up."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

from models import flops, packing
from pruning.cli import configuration
from pruning.corpus.reader import load_corpus
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.scores.model import batches, chunk_scores, device, engine, estimate
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.batches import Reader
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.loading import corpus_for, scorer_tokenizer
from pruning.scores.model.scorer import Documents, ScoreError
from pruning.scores.score_set import Column, schema_of
from pruning.store.artifact import load_artifact
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError, ConfigurationChanged, config_of

REPOSITORY = Path(__file__).resolve().parents[4]
ASK = AskLLM(prompt="q {document} a", yes=("y", "Y"), no=("n",), max_tokens=48)
SPAN = Likelihood("span", window=24, overlap=10, span_length=2, masks=3)
CAUSAL = Likelihood("causal", window=24, overlap=10, token_nll=True)
# Of processes with the number of devices that users have.
ALONE = os.environ | {"JAX_NUM_CPU_DEVICES": "-1"}


@pytest.fixture
def config(corpus_path, model_path, tmp_path) -> ScoreConfig:
    return ScoreConfig(
        corpus=str(corpus_path),
        output=str(tmp_path / "scores"),
        scorer=CAUSAL,
        model=str(model_path),
        tokenizer="corpus",
        row_length=64,
        batch_rows=8,
        dtype="float32",
        compilation_cache=str(tmp_path.parent / "compiled"),
    )


def run(config: ScoreConfig, **changes) -> pa.Table:
    """Scores, and returns all rows."""
    scores = engine.run(dataclasses.replace(config, **changes))
    return pa.concat_tables([scores.read(shard) for shard in range(scores.num_shards)])


def reference(scorer, plain, tokens: list[int]) -> dict[str, float]:
    """A document's scores, one window at a time."""
    if isinstance(scorer, AskLLM):
        bytes_ = Vocabulary("bytes", b"", 125)
        shown = [*bytes_.encode("q "), *tokens[: 48 - 5], *bytes_.encode(" a"), 1]
        log_p = plain.decode(plain.encode(shown), [0])[0]
        yes = np.logaddexp(*log_p[[bytes_.token("y"), bytes_.token("Y")]])
        return {"ask_llm_yes": yes, "ask_llm_no": log_p[bytes_.token("n")]}
    assert scorer is CAUSAL
    nll, scored, start = 0.0, 0, 0
    while scored < len(tokens):
        stop = min(start + 24, len(tokens))
        log_p = plain.decode(plain.encode([1]), [0, *tokens[start : stop - 1]])
        nll -= sum(log_p[p - start, tokens[p]] for p in range(scored, stop))
        scored, start = stop, start + 14
    return {"nll": nll, "n_scored_tokens": len(tokens)}


@pytest.mark.parametrize("kernel", ["triton_interpret"])
def test_a_kernel_by_name_gives_the_scores_of_the_plain_form(config, tmp_path, kernel):
    found = [
        run(config, scorer=ASK, attention=attention, output=str(tmp_path / attention))
        for attention in ("xla", kernel)
    ]
    assert found[0]["status"].equals(found[1]["status"])
    for column in ("ask_llm_yes", "ask_llm_no"):
        plain, ours = (np.asarray(table[column], np.float64) for table in found)
        assert np.isfinite(plain).sum() > 10
        np.testing.assert_allclose(ours, plain, rtol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="attention='tirton'"):
        run(config, attention="tirton", output=str(tmp_path / "misspelled"))


def test_the_compiler_gets_its_options(config):
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        run(config, compiler_options={"xla_no_such_option": True})
    run(config, compiler_options={"xla_cpu_enable_fast_math": False})


@pytest.mark.parametrize("scorer", [ASK, CAUSAL], ids=["ask_llm", "causal"])
def test_every_document_has_the_plain_models_score(config, scorer, tiny_t5, random_shards):
    table = run(config, scorer=scorer)
    documents = [tokens for shard in random_shards for tokens in shard]
    ids = [(k << 32) + row for k, shard in enumerate(random_shards) for row in range(len(shard))]
    assert table["doc_id"].to_pylist() == ids
    for row, tokens in zip(table.to_pylist(), documents, strict=True):
        if not tokens:
            assert row["status"] == "empty"
            assert all(row[name] is None for name in row if name not in ("doc_id", "status"))
            continue
        assert row["status"] == "ok"
        for name, value in reference(scorer, tiny_t5.plain, tokens).items():
            assert row[name] == pytest.approx(value, rel=1e-5)
    manifest = load_artifact(config.output, "scores").manifest
    empty = sum(not tokens for tokens in documents)
    assert manifest.counts["documents"] == {"ok": len(documents) - empty, "empty": empty}
    assert manifest.tokens == sum(map(len, documents))


def either(ask: bool, span: bool, changes: dict) -> list:
    """Ask-LLM and spans with these changes: one by default, as both share the engine."""
    return [
        pytest.param(
            scorer, changes, id=f"{name}-{changes}", marks=() if now else pytest.mark.sweep
        )
        for scorer, name, now in ((ASK, "ask_llm", ask), (SPAN, "span", span))
    ]


@pytest.mark.parametrize(
    ("scorer", "changes"),
    [
        *either(False, True, {"row_length": 25, "batch_rows": 8}),
        *either(False, True, {"row_length": 300, "batch_rows": 8}),
        *either(True, False, {"batch_rows": 24}),
        *either(False, True, {"fsdp": 4}),
        *either(True, False, {"fsdp": 2, "tensor": 2}),
        *either(True, False, {"tensor": 8, "batch_rows": 3}),
        *either(False, True, {"scan_layers": False, "fsdp": 2}),
    ],
)
def test_scores_do_not_depend_on_how_they_are_computed(
    config, scorer, changes, scores_of, eight_devices
):
    if scorer is ASK and changes.get("row_length") == 25:
        changes = changes | {"row_length": 48}
    expected, found = scores_of(scorer), run(config, scorer=scorer, **changes)
    assert found["doc_id"].equals(expected["doc_id"])
    assert found["status"].to_pylist() == expected["status"].to_pylist()
    for name in expected.column_names[2:]:
        a, b = (t[name].combine_chunks().fill_null(0).to_numpy() for t in (expected, found))
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scorer", "scan_layers"),
    [
        pytest.param(ASK, True, id="ask_llm-scan"),
        pytest.param(CAUSAL, False, id="causal-unrolled"),
        pytest.param(SPAN, True, id="span-scan"),
        # Like those above, the other way around.
        pytest.param(ASK, False, id="ask_llm-unrolled", marks=pytest.mark.sweep),
        pytest.param(CAUSAL, True, id="causal-scan", marks=pytest.mark.sweep),
        pytest.param(SPAN, False, id="span-unrolled", marks=pytest.mark.sweep),
    ],
)
def test_scores_in_bfloat16_are_near(config, scorer, scan_layers, scores_of):
    # Rows of a program are several: a CPU has no kernel for some products of bfloat16 in batches.
    expected = scores_of(scorer)
    changes = {"dtype": "bfloat16", "scan_layers": scan_layers, "batch_rows": 32}
    found = run(config, scorer=scorer, **changes)
    name = expected.column_names[2]
    exact, ours = (t[name].combine_chunks().fill_null(0).to_numpy() for t in (expected, found))
    assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 1e-2


def test_the_residual_stream_may_be_bfloat16_too(config, tmp_path, scores_of):
    exact = scores_of(ASK)["ask_llm_yes"].combine_chunks().fill_null(0).to_numpy()

    def distance(**changes) -> float:
        found = run(config, scorer=ASK, dtype="bfloat16", **changes)
        values = found["ask_llm_yes"].combine_chunks().fill_null(0).to_numpy()
        return np.linalg.norm(values - exact) / np.linalg.norm(exact)

    with pytest.raises(ValueError, match="requires dtype='bfloat16'"):
        run(config, residual_dtype="bfloat16")
    rounded = distance(residual_dtype="bfloat16", output=str(tmp_path / "rounded"))
    assert 0 < rounded < 2e-2
    assert rounded != distance()
    with pytest.raises(ConfigurationChanged, match="residual_dtype"):
        run(config, scorer=ASK, dtype="bfloat16", residual_dtype="bfloat16")


def test_rows_may_be_computed_one_after_the_other(config, scores_of, monkeypatch, eight_devices):
    monkeypatch.setattr(device, "_CPU_TOKENS", 64)  # one row of a batch of five at a time
    expected, found = scores_of(ASK), run(config, scorer=ASK, tensor=8, batch_rows=5)
    assert found["status"].to_pylist() == expected["status"].to_pylist()
    for name in ("ask_llm_yes", "ask_llm_no"):
        a, b = (t[name].combine_chunks().fill_null(0).to_numpy() for t in (expected, found))
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_every_core_is_a_device_and_all_share_the_parameters(model_path):
    code = f"""
import jax
from pruning.scores.model import device
device.available_cpus = lambda: 6
device.use_cores(16)  # rows, which six cores do not divide
params = device.load({str(model_path)!r}, "bfloat16").params
device.use_cores(2)  # JAX has started
places = [{{s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}}
          for leaf in jax.tree.leaves(params)]
print(jax.local_device_count(), max(map(len, places)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE)
    assert ran.stdout.split() == ["4", "1"], ran.stderr


def test_a_run_computes_on_every_core(corpus_path, model_path, tmp_path):
    code = f"""
from pruning.scores.model import device, engine
from pruning.scores.model.likelihood import Likelihood
device.available_cpus = lambda: 2
engine.run(engine.ScoreConfig(
    corpus={str(corpus_path)!r}, output={str(tmp_path / "scores")!r},
    scorer=Likelihood("causal", window=32, overlap=8), model={str(model_path)!r},
    tokenizer="corpus", row_length=64, compilation_cache=None))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE)
    assert "tokens on 2 x cpu" in ran.stderr, ran.stderr


@pytest.fixture(scope="session")
def scores_of(corpus_path, model_path, tmp_path_factory):
    """A scorer's scores under one setting, computed once."""
    known: dict = {}

    def get(scorer) -> pa.Table:
        if scorer not in known:
            path = tmp_path_factory.mktemp("expected")
            known[scorer] = run(
                ScoreConfig(
                    corpus=str(corpus_path),
                    output=str(path / "scores"),
                    scorer=scorer,
                    model=str(model_path),
                    tokenizer="corpus",
                    row_length=64,
                    batch_rows=8,
                    dtype="float32",
                    compilation_cache=None,
                )
            )
        return known[scorer]

    return get


def test_workers_share_the_shards_and_leave_the_same_bytes(config, tmp_path):
    run(config)
    alone = {file.name: file.read_bytes() for file in sorted(Path(config.output).iterdir())}
    shared = dataclasses.replace(config, output=str(tmp_path / "shared"), workers=2)
    assert engine.run(dataclasses.replace(shared, worker=1)) is None
    # Batch size may change between one start and the next; here it must not, to compare bytes.
    assert engine.run(dataclasses.replace(shared, worker=0)) is not None
    together = {file.name: file.read_bytes() for file in sorted(Path(shared.output).iterdir())}
    assert alone.keys() == together.keys()
    for name in alone:
        if name != "measured.json":
            assert alone[name] == together[name], name


def test_a_selection_bounds_what_is_scored(config, tmp_path, scores_of, corpus_path):
    corpus = load_corpus(corpus_path)
    schema = pa.schema([("doc_id", pa.int64()), ("n_tokens", pa.int32())])
    inputs = {"corpus": corpus.artifact}
    build = Build(tmp_path / "some", "selection", {}, inputs, corpus.num_shards, schema)
    kept = set()
    for shard in build.pending():
        rows = corpus.columns(shard, ["doc_id", "n_tokens"])
        rows = rows.take(np.arange(0, rows.num_rows, 3))
        kept |= set(rows["doc_id"].to_pylist())
        with build.shard(shard) as writer:
            writer.write(rows)
    build.finish()
    everything = {row["doc_id"]: row for row in scores_of(CAUSAL).to_pylist()}
    some = run(config, within=str(tmp_path / "some")).to_pylist()
    assert len(some) == len(everything)
    for row in some:
        if row["doc_id"] not in kept:
            assert row["status"] == "not_selected"
            assert row["nll"] is None
        elif row["status"] == "ok":
            assert row["nll"] == pytest.approx(everything[row["doc_id"]]["nll"], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# What must be refused, or reported


def test_a_poisoned_document_does_not_reach_its_neighbors(
    config, tmp_path, random_shards, scores_of, build_corpus
):
    """Ids beyond the model's table give NaN, in the whole row that the document stands in."""

    shards = [list(map(list, shard)) for shard in random_shards]
    shards[2][5] = [5, 6, 500, 7]
    shards[2][9] = [600] * 30
    build_corpus(tmp_path / "poisoned", shards)
    found = run(config, corpus=str(tmp_path / "poisoned"), row_length=96).to_pylist()
    expected = scores_of(CAUSAL).to_pylist()
    poisoned = {(2 << 32) + 5, (2 << 32) + 9}
    for row, other in zip(found, expected, strict=True):
        if row["doc_id"] in poisoned:
            assert row["status"] == "not_finite"
            assert row["nll"] is None
        else:
            assert row["status"] == other["status"]
            if row["status"] == "ok":
                assert row["nll"] == pytest.approx(other["nll"], rel=1e-5)
    counts = load_artifact(config.output).manifest.counts["documents"]
    assert counts["not_finite"] == 2


def test_a_model_that_answers_only_nan_stops_the_run(config, tmp_path, tiny_t5, monkeypatch):
    import jax

    from models import weights

    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny_t5.params)
    weights.save(tmp_path / "broken", tiny_t5.model, broken)
    monkeypatch.setattr(chunk_scores, "_DOUBTFUL", 10)
    with pytest.raises(FloatingPointError, match="not one of"):
        run(config, model=str(tmp_path / "broken"))
    assert not list(Path(config.output).glob(".*.tmp"))  # the unfinished shard is not left behind


def test_other_settings_are_refused_in_a_begun_directory(config, tmp_path, tiny_t5):
    import jax

    from models import weights

    run(config)
    with pytest.raises(ConfigurationChanged, match="row_lengths"):
        run(config, row_length=80)
    with pytest.raises(ConfigurationChanged, match="scorer"):
        run(config, scorer=ASK)
    other = jax.tree.map(lambda leaf: leaf + 1e-3, tiny_t5.params)
    weights.save(tmp_path / "other", tiny_t5.model, other)
    with pytest.raises(ConfigurationChanged, match="digest"):
        run(config, model=str(tmp_path / "other"))
    run(config, batch_rows=16)  # no number changes


def test_unfit_models_and_settings_are_refused(config, tmp_path, tiny_t5):
    import jax

    from models import weights
    from models.model import Model

    small = Model(dataclasses.replace(tiny_t5.model.config, vocab_size=300))
    weights.save(tmp_path / "small", small, jax.jit(small.init)(jax.random.key(0)))
    with pytest.raises(VocabularyError, match="has 300 ids"):
        run(config, model=str(tmp_path / "small"))
    with pytest.raises(ScoreError, match="shorter than the longest window"):
        run(config, row_length=20)
    with pytest.raises(ScoreError, match="does not divide"):
        run(config, batch_rows=3)


def test_a_corpus_is_read_with_the_tokenizer_of_the_model(tmp_path, tiny_t5, corpus_path):
    """The tokenizer beside the weights decides; one that is not there is asked for."""
    import sentencepiece

    from models import weights

    sentencepiece.SentencePieceTrainer.Train(
        input=__file__, model_prefix=str(tmp_path / "own"), vocab_size=200, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    own = Vocabulary.from_file(tmp_path / "own.model")
    model, corpus = tiny_t5.model, load_corpus(corpus_path)
    path = str(tmp_path / "model")
    weights.save(path, model, tiny_t5.params, vocabulary_file=tmp_path / "own.model")
    read = corpus_for(path, model.config, corpus)
    assert read.vocabulary == own
    texts = corpus.columns(0, ["text"])["text"].to_pylist()
    prompt = ASK.prompt_ids(scorer_tokenizer(read), model.config)
    assert prompt.encode(texts) == [[*own.encode(f"q {text} a"), 1] for text in texts]
    assert scorer_tokenizer(corpus) is corpus.vocabulary  # and its stored tokens
    tokens = read.columns(0, ["doc_id", "tokens", "n_tokens"])
    assert tokens["tokens"].to_pylist() == own.encode_batch(texts)
    assert tokens["doc_id"].to_pylist() == corpus.columns(0, ["doc_id"])["doc_id"].to_pylist()
    weights.save(tmp_path / "bare", model, tiny_t5.params)
    with pytest.raises(VocabularyError, match="no tokenizer lies beside"):
        corpus_for(str(tmp_path / "bare"), model.config, corpus)
    assert corpus_for(str(tmp_path / "bare"), model.config, corpus, "corpus") is corpus


def test_a_changed_corpus_is_noticed(config, tmp_path, random_shards, build_corpus):

    build_corpus(tmp_path / "corpus", random_shards)
    build_corpus(tmp_path / "shorter", [random_shards[0][:-2], *random_shards[1:]])
    name = "data-00000-of-00003.parquet"
    (tmp_path / "corpus" / name).write_bytes((tmp_path / "shorter" / name).read_bytes())
    with pytest.raises(ArtifactError, match="is damaged, or belongs to another shard"):
        run(config, corpus=str(tmp_path / "corpus"))


# --------------------------------------------------------------------------------------------------
# The pieces


@pytest.mark.parametrize("chunk_documents", [1, 8, 10_000])
@pytest.mark.parametrize("batch_rows", [1, 7])
def test_chunks_and_batches_lose_nothing(
    corpus_path, tmp_path, monkeypatch, summing, random_shards, chunk_documents, batch_rows
):
    monkeypatch.setattr(batches, "CHUNK_DOCUMENTS", chunk_documents)
    monkeypatch.setattr(batches, "_READ_DOCUMENTS", 5)
    monkeypatch.setattr(engine, "_ROW_GROUP", 20)
    corpus = load_corpus(corpus_path)
    prepared = summing()
    reader = Reader(corpus, None, prepared, (300,), batch_rows)
    inputs = {"corpus": corpus.artifact}
    schema = schema_of(prepared.columns)
    build = Build(tmp_path / "sums", "scores", {}, inputs, corpus.num_shards, schema)
    seen = []

    def ask(rows):
        seen.append({name: values.shape for name, values in rows.items()})
        return rows["tokens"].astype(np.float32)

    engine.score(reader, build.pending(), ask, build)
    scores = build.finish()
    assert all(shapes == reader.batch_shapes for shapes in seen)
    for shard, documents in enumerate(random_shards):
        sums = scores.read(shard)["sum"].to_pylist()
        assert sums == [sum(tokens) if tokens else None for tokens in documents]
        with scores.parquet(shard) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert all(20 <= size < 20 + chunk_documents for size in sizes[:-1])


def test_errors_of_every_thread_reach_the_caller(corpus_path, summing, tmp_path):
    corpus = load_corpus(corpus_path)
    prepared = summing()
    schema = schema_of(prepared.columns)

    def attempt(place, prepared=prepared, ask=lambda rows: rows["tokens"] * 1.0):
        inputs = {"corpus": corpus.artifact}
        build = Build(tmp_path / place, "scores", {}, inputs, corpus.num_shards, schema)
        engine.score(Reader(corpus, None, prepared, (300,), 2), build.pending(), ask, build)

    def fail(*_):
        raise RuntimeError("on purpose")

    def fail_with_documents(documents):
        return fail() if len(documents) else prepared.windows(documents)

    with pytest.raises(RuntimeError, match="on purpose"):
        attempt("ahead", prepared=dataclasses.replace(prepared, windows=fail_with_documents))
    with pytest.raises(RuntimeError, match="on purpose"):
        attempt("driver", ask=fail)
    wrong = dataclasses.replace(prepared, columns={"other": prepared.columns["sum"]})
    with pytest.raises(KeyError):
        attempt("unpacking", prepared=wrong)
    other = dataclasses.replace(prepared, columns={"sum": Column(pa.string(), "not a number")})
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError)):
        attempt("columns", prepared=other)


def test_the_estimate_is_what_a_run_measures(config, capsys):
    run(config)
    measured = json.loads((Path(config.output) / "measured.json").read_text())
    corpus = load_corpus(config.corpus)
    found = engine.dry_run(config, corpus, None)
    assert found.documents == corpus.artifact.manifest.rows
    assert found.tokens == measured["model_tokens"]
    assert found.useful_flops == pytest.approx(measured["useful_flops"])
    assert found.rows == pytest.approx(measured["rows"], abs=corpus.num_shards)
    assert found.done_flops > found.useful_flops > 0
    # What was measured is said in the lines of the estimate, with the estimate beside it.
    said = capsys.readouterr().out
    assert f"tokens         {found.tokens:,} (estimated {found.tokens:,}) after packing" in said
    assert f"FLOPs          {found.useful_flops:.3g} by the plain model (estimated" in said
    assert said.splitlines() == measured["cost"]
    assert measured["documents"] == found.documents and measured["windows"] == found.windows
    assert 0 < measured["padding"] < 1
    assert measured["padding"] == pytest.approx(
        1 - measured["model_tokens"] / measured["positions"]
    )
    assert measured["done_flops"] > measured["useful_flops"]
    assert measured["device_seconds"] == pytest.approx(8 * measured["seconds"])  # fake devices
    assert measured["accelerator_hours"] == pytest.approx(measured["device_seconds"] / 3600)
    assert measured["compile_seconds"] > 0 and measured["start_seconds"] > 0
    assert "share_of_peak" not in measured  # nobody knows a CPU's
    assert engine.run(dataclasses.replace(config, dry_run=True, output="nowhere")) is None
    text = capsys.readouterr().out
    assert "accelerator-hours" in text
    assert not Path("nowhere").exists()


def test_what_workers_measured_adds_up_to_shares_of_peak():
    one = {
        "documents": 10.0, "windows": 20.0, "rows": 4.0, "positions": 4096.0,
        "model_tokens": 3072.0, "useful_flops": 6e12, "done_flops": 8e12, "seconds": 2.0,
        "device_seconds": 4.0, "potential_flops": 4 * 197e12, "unknown_peak_seconds": 0.0,
        "start_seconds": 5.0, "compile_seconds": 7.0,
    }  # fmt: skip
    measured = estimate.Measured.of(one)
    assert measured.padding == 0.25
    assert measured.flops_per_second == 1.5e12
    assert measured.share_of_peak == pytest.approx(1.5 / 197)
    assert measured.executed_share_of_peak == pytest.approx(2 / 197)
    text = "\n".join(measured.lines())
    assert (
        "1.5 TFLOP/s a device, 1% of the bf16 peak by the plain model, 1% executed" in text
        and "estimated" not in text
    )
    # Two workers on other chips: what both could have done counts.
    other = one | {"potential_flops": 4 * 918e12}
    both = {name: one[name] + other[name] for name in one}
    assert estimate.Measured.of(both).share_of_peak == pytest.approx(3 / (197 + 918))
    assert estimate.Measured.of(both | {"unknown_peak_seconds": 1.0}).share_of_peak is None


def test_flops_of_windows_are_those_of_single_rows(tiny_t5):
    for sides in (("encoder", "decoder"), ("decoder", "answer")):
        costs = estimate.Costs(tiny_t5.model.config, sides)
        total = costs.of(np.array([[3, 5], [10, 1]]))
        assert total == pytest.approx(costs.of(np.array([[3, 5]])) + costs.of(np.array([[10, 1]])))
    shapes = {"encoder_input_tokens": (1, 3), "decoder_input_tokens": (1, 5)}
    expected = flops.forward_flops(tiny_t5.model.config, shapes)
    costs = estimate.Costs(tiny_t5.model.config, ("encoder", "decoder"))
    assert costs.of(np.array([[3, 5]])) == pytest.approx(expected)


@pytest.mark.parametrize("file", ["ask_llm.gin", "likelihood.gin"])
def test_gin_files_make_configurations(file):
    built = configuration.build(
        engine.NAME,
        engine.CONFIGURABLES,
        [str(REPOSITORY / "configs" / "score" / file)],
        ["CORPUS = 'somewhere'", "Score.batch_rows = 4"],
    )
    assert isinstance(built, ScoreConfig)
    assert (built.corpus, built.batch_rows) == ("somewhere", 4)
    by_hand = AskLLM() if file == "ask_llm.gin" else Likelihood("span")
    assert built.scorer == by_hand
    assert config_of(built.scorer) == config_of(by_hand)


def test_imports_are_light():
    script = (
        "import sys; import pruning.scores.model; assert 'numpy' not in sys.modules;"
        "import pruning.scores.model.engine; assert 'jax' not in sys.modules;"
        "import pruning.scores.model.device, pruning.scores.model.estimate;"
        "bad = {'tensorflow', 'seqio', 'torch', 'transformers'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("scorer", [ASK, SPAN, Likelihood("prefix", window=24, overlap=10)])
@pytest.mark.parametrize("decoder", [4, 16, 80])  # less than d_kv, d_kv, more
def test_executed_flops_are_those_of_the_steps(tiny_t5, scorer, decoder):
    """Compares the closed form of the estimate with what the traced step computes."""
    model = tiny_t5.model
    prepared = scorer.prepare(model, Vocabulary.from_file("bytes"))
    lengths, nothing = (64, decoder), prepared.windows(Documents.of([]))
    rows = packing.pack(nothing.lengths, lengths).fill(nothing)
    batch = {n: jax.ShapeDtypeStruct((2, *row.shape[1:]), np.int32) for n, row in rows.items()}
    step = jax.jit(prepared.step).trace(model.shapes(), batch)
    costs = estimate.Costs.of_scorer(model.config, prepared)
    executed = flops.traced_flops(step.jaxpr)
    assert 2 * costs.executed(lengths) == pytest.approx(executed)
    absorbed = scorer is ASK and decoder < model.config.d_kv
    assert (executed < 2 * costs.of(np.array([lengths]))) == absorbed


@pytest.mark.parametrize(
    ("worker", "workers", "said"),
    [(6, 6, "counts from 0 to workers - 1"), (-1, 2, "counts from 0"), (0, 0, "at least 1"),
     (0, -3, "at least 1"), (3, None, "needs workers")],
)  # fmt: skip
def test_workers_are_checked_where_they_are_set(config, worker, workers, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, worker=worker, workers=workers)


@dataclasses.dataclass(frozen=True)
class Failing:
    """Ask-LLM that fails on documents with the token 5."""

    def prepare(self, model, vocabulary):
        def windows(documents):
            if np.any(documents.tokens == 5):
                raise ValueError("there is no window for this")
            return prepared.windows(documents)

        prepared = ASK.prepare(model, vocabulary)
        return dataclasses.replace(prepared, windows=windows)


def test_a_scorer_that_fails_on_the_only_document_is_an_error(config, build_corpus, tmp_path):
    build_corpus(tmp_path / "one", [[[5, 6, 7]]])
    settings = {"corpus": str(tmp_path / "one"), "output": str(tmp_path / "out")}
    with pytest.raises(ScoreError, match='no document has a score: 1 are "failed"'):
        run(config, scorer=Failing(), **settings)
    # A round of a cascade may have just that document.
    one = dataclasses.replace(config, scorer=Failing(), **settings)
    found = engine.run(one, may_all_fail=True)
    assert found is not None and found.manifest.counts["documents"] == {"failed": 1}


def test_a_scorer_of_a_users_module_is_named_in_gin(tmp_path, monkeypatch):
    (tmp_path / "their_scorer.py").write_text(
        "import dataclasses, gin\n"
        "from pruning.scores.model.ask_llm import AskLLM\n\n"
        "@gin.configurable\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Shorter:\n"
        "    max_tokens: int = 64\n\n"
        "    def prepare(self, model, tokenizer):\n"
        "        return AskLLM(max_tokens=self.max_tokens).prepare(model, tokenizer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "their.gin"
    file.write_text(
        "import their_scorer\nScore.scorer = @their_scorer.Shorter()\n"
        "Score.corpus = 'c'\nScore.output = 'o'\nScore.model = 'm'\n"
    )
    build = configuration.build
    found = build(engine.NAME, engine.CONFIGURABLES, [str(file)], ["Shorter.max_tokens = 99"])
    assert config_of(found.scorer) == {"class": "Shorter", "max_tokens": 99}
    with pytest.raises(configuration.ConfigurationError, match=r"Score\.scorer must be Scorer"):
        build(engine.NAME, engine.CONFIGURABLES, [str(file)], ["Score.scorer = 'AskLLM'"])
