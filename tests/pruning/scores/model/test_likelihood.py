"""Log-likelihood: every token once, and the numbers of a plain model that knows no packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import packing
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.scorer import Documents

WINDOW, OVERLAP = 24, 10
ESTIMATORS = ("prefix", "span", "causal")


VOCABULARY = Vocabulary("bytes", b"", 125)  # 259 ids, and sentinels from 383 down


def settings_of(estimator: str, **changes) -> Likelihood:
    values = {"window": WINDOW, "overlap": OVERLAP, "span_length": 2, "masks": 3}
    return Likelihood(estimator, **(values | changes))


# --------------------------------------------------------------------------------------------------
# The references: one document, one window, one token at a time


def windows_of_one(scorer: Likelihood, n: int):
    """(first token seen, first scored, last scored, last seen) of each window, half-open."""
    window, overlap = scorer.window, scorer.overlap
    if scorer.estimator == "prefix":
        for first in range(0, n, window - overlap):
            last = min(first + window - overlap, n)
            begin = max(first, 1)
            if begin < last:
                yield max(0, begin - overlap), begin, last, last
        return
    before = overlap if scorer.estimator == "causal" else overlap // 2
    start, scored = 0, 0
    while scored < n:
        stop = min(start + window, n)
        last = stop if stop == n else stop - (overlap - before)
        yield start, scored, last, stop
        scored, start = last, start + window - overlap


def reference(scorer: Likelihood, plain, tokens: list[int]) -> np.ndarray:
    """-log P of every token; NaN where it is not scored."""
    nll = np.full(len(tokens), np.nan)

    def score(encoder, targets, positions):
        log_p = plain.decode(plain.encode(encoder), [0, *targets[:-1]])
        for at, (target, position) in enumerate(zip(targets, positions, strict=True)):
            if position is not None:
                assert np.isnan(nll[position])
                nll[position] = -log_p[at, target]

    for start, first, last, stop in windows_of_one(scorer, len(tokens)):
        if scorer.estimator == "prefix":
            score(tokens[start:first], tokens[first:last], list(range(first, last)))
        elif scorer.estimator == "causal":
            positions = [p if p >= first else None for p in range(start, stop)]
            score([1], tokens[start:stop], positions)
        else:
            for mask in range(scorer.masks):
                encoder, targets, positions, spans = [], [], [], 0
                for p in range(start, stop):
                    inside = first <= p < last
                    span, place = divmod(p - first, scorer.span_length)
                    if not (inside and span % scorer.masks == mask):
                        encoder.append(tokens[p])
                        continue
                    if place == 0:
                        encoder.append(383 - spans)
                        targets.append(383 - spans)
                        positions.append(None)
                        spans += 1
                    targets.append(tokens[p])
                    positions.append(p)
                if targets:
                    score([*encoder, 1], targets, positions)
    return nll


_COMPILED: dict = {}


def score(scorer, model, params, documents, row_length):
    """Through windows, packing, the model's step and `finish`, by hand."""
    import jax

    prepared = scorer.prepare(model, VOCABULARY)
    windows = prepared.windows(documents)
    row_lengths = tuple(max(row_length, longest) for longest in prepared.longest)
    packed = packing.pack(windows.lengths, row_lengths)
    answers = []
    for first in range(0, max(packed.num_rows, 1), 16):
        rows = {name: r[first : first + 16] for name, r in packed.fill(windows).items()}
        rows = {name: np.pad(r, ((0, 16 - len(r)), (0, 0))) for name, r in rows.items()}
        if (scorer, model, row_lengths) not in _COMPILED:
            _COMPILED[scorer, model, row_lengths] = jax.jit(prepared.step)
        answers.append(np.asarray(_COMPILED[scorer, model, row_lengths](params, rows)))
    answers = np.concatenate(answers)[: packed.num_rows]
    return prepared, windows, prepared.finish(documents, windows, packed.gather(windows, answers))


def random_documents(lengths: list[int], seed: int) -> Documents:
    rng = np.random.default_rng(seed)
    return Documents.of([rng.integers(3, 259, n).tolist() for n in lengths])


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    # From one token to twenty windows.
    lengths=st.lists(st.integers(1, 60) | st.integers(1, 20 * (WINDOW - OVERLAP)), max_size=7),
    row_length=st.sampled_from([32, 64]),
    seed=st.integers(0, 1000),
)
def test_scores_are_the_plain_models(tiny_t5, estimator, lengths, row_length, seed):
    model, params, plain = tiny_t5
    scorer = settings_of(estimator, token_nll=True)
    documents = random_documents(lengths, seed)
    _, _, scores = score(scorer, model, params, documents, row_length)
    for d in range(len(documents)):
        tokens = documents.tokens[documents.offsets[d] : documents.offsets[d + 1]].tolist()
        expected = reference(scorer, plain, tokens)
        scored = ~np.isnan(expected)
        count = int(scored.sum())
        assert count == (len(tokens) - 1 if estimator == "prefix" else len(tokens))
        assert scores.columns["n_scored_tokens"][d] == count
        assert scores.columns["truncated_tokens"][d] == 0
        assert scores.statuses["too_short"][d] == (count == 0)
        # 1e-5 a token.
        assert abs(scores.columns["nll"][d] - np.nansum(expected)) <= 1e-5 * max(count, 1)
        kept = scores.columns["token_nll"][d].as_py()
        assert [value is None for value in kept] == (~scored).tolist()
        values = np.array([value for value in kept if value is not None], np.float64)
        np.testing.assert_allclose(values, expected[scored], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(0, 300), max_size=8),
    window=st.integers(2, 40),
    data=st.data(),
)
def test_every_token_is_scored_once(tiny_t5, estimator, lengths, window, data):
    model = tiny_t5[0]
    overlap = data.draw(st.integers(1, window - 1))
    span, masks = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 8))
    scorer = Likelihood(estimator, window, overlap, span_length=span, masks=masks)
    documents = random_documents(lengths, 0)
    prepared = scorer.prepare(model, VOCABULARY)
    windows = prepared.windows(documents)
    source = windows.source[windows.source >= 0]
    scored = np.bincount(source, minlength=len(documents.tokens))
    first = documents.offsets[:-1][documents.lengths > 0]
    if estimator == "prefix":
        assert (scored[first] == 0).all()
        scored[first] = 1
    assert (scored == 1).all()
    # No window is longer than promised, and the targets are the documents' own tokens.
    assert (windows.lengths <= np.array(prepared.longest)).all()
    targets = windows.sides[-1].features["decoder_target_tokens"]
    assert np.array_equal(targets[windows.source >= 0], documents.tokens[source])
    # A position's token belongs to its window's document.
    owner = np.repeat(np.arange(len(documents)), documents.lengths)
    window_of = np.repeat(np.arange(len(windows)), windows.sides[-1].lengths)
    assert np.array_equal(owner[source], windows.document[window_of][windows.source >= 0])


def test_masks_show_what_others_hide(tiny_t5):
    """Over the masks of one window the encoder shows every token, but where it is masked."""
    scorer = settings_of("span", window=100)
    documents = random_documents([40], 3)
    windows = scorer.prepare(tiny_t5[0], VOCABULARY).windows(documents)
    encoder = windows.sides[0]
    for w in range(len(windows)):
        tokens = encoder.features["encoder_input_tokens"][
            encoder.offsets[w] : encoder.offsets[w + 1]
        ]
        decoder = windows.sides[1]
        at = slice(decoder.offsets[w], decoder.offsets[w + 1])
        hidden = windows.source[at]
        seen = np.delete(documents.tokens, hidden[hidden >= 0])
        assert tokens[-1] == 1
        assert np.array_equal(tokens[tokens < 259][:-1], seen)
        sentinels = decoder.features["decoder_target_tokens"][at][hidden < 0]
        assert np.array_equal(tokens[tokens >= 259], sentinels)
        assert np.array_equal(sentinels, 383 - np.arange(len(sentinels)))
    assert len(windows) == 3


def test_blocks_do_not_change_the_windows(tiny_t5, monkeypatch):
    from pruning.scores.model import likelihood

    documents = random_documents([70, 3, 0, 200, 1], 5)
    prepared = settings_of("span").prepare(tiny_t5[0], VOCABULARY)
    whole = prepared.windows(documents)
    monkeypatch.setattr(likelihood, "_BLOCK", 50)
    pieces = prepared.windows(documents)
    assert contents(whole) == contents(pieces)


def contents(windows) -> list:
    """What every window holds, whatever their order."""
    found = []
    for w, document in enumerate(windows.document.tolist()):
        parts = [document]
        for side in windows.sides:
            at = slice(side.offsets[w], side.offsets[w + 1])
            parts += [values[at].tolist() for values in side.features.values()]
        found.append([*parts, windows.source[at].tolist()])
    return sorted(found)


def test_long_documents_are_cut_only_when_asked(tiny_t5):
    model, params, _ = tiny_t5
    documents = random_documents([5, 90], 1)
    _, _, scores = score(settings_of("causal", max_tokens=30), model, params, documents, 32)
    assert scores.columns["n_scored_tokens"].tolist() == [5, 30]
    assert scores.columns["truncated_tokens"].tolist() == [0, 60]
    _, _, alone = score(settings_of("causal"), model, params, documents.cut(30)[0], 32)
    np.testing.assert_allclose(scores.columns["nll"], alone.columns["nll"], rtol=1e-5)


@pytest.mark.parametrize("bos", [None, 2])
def test_decoder_only(bos):
    """Windows of a decoder-only model against one pass per window without packing."""
    import jax

    from models.config import DecoderConfig
    from models.model import Model

    config = DecoderConfig(
        vocab_size=384,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        bos_id=bos,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    scorer = settings_of("causal")
    documents = random_documents([1, 2, 24, 25, 100], 2)
    _, _, scores = score(scorer, model, params, documents, 64)
    log_p = jax.jit(lambda params, ids: jax.nn.log_softmax(model.bind(params).logits(
        model.bind(params).hidden(ids))))  # fmt: skip
    for d in range(len(documents)):
        tokens = documents.tokens[documents.offsets[d] : documents.offsets[d + 1]].tolist()
        total, count = 0.0, 0
        for start, first, last, stop in windows_of_one(scorer, len(tokens)):
            seen = [bos or 0, *tokens[start:stop]]  # models trained here begin with padding
            padded = np.zeros((1, 32), np.int32)  # to the right: nobody sees it
            padded[0, : len(seen)] = seen
            table = np.asarray(log_p(params, padded))[0]
            for p in range(first, last):
                total -= table[p - start, tokens[p]]
                count += 1
        assert scores.columns["n_scored_tokens"][d] == count == len(tokens)
        assert abs(scores.columns["nll"][d] - total) <= 1e-5 * max(count, 1)
        assert scores.statuses["too_short"][d] == (count == 0)


def test_unfit_settings_are_refused(tiny_t5):
    from models.config import DecoderConfig
    from models.model import Model

    with pytest.raises(ValueError, match="overlap"):
        Likelihood("causal", window=8, overlap=8)
    with pytest.raises(ValueError, match="masks"):
        Likelihood("span", masks=1)
    with pytest.raises(ValueError, match="sentinels"):
        Likelihood("span", window=4000).prepare(tiny_t5[0], VOCABULARY)
    shape = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    decoder = Model(DecoderConfig(vocab_size=384, head_dim=8, **shape))
    with pytest.raises(ValueError, match="needs an encoder"):
        Likelihood("prefix").prepare(decoder, VOCABULARY)
