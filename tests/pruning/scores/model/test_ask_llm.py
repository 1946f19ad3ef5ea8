"""Ask-LLM: the prompt's pieces are the prompt, and packed answers are a plain model's answers."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import packing
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.scores.model.ask_llm import PROMPT, AskLLM
from pruning.scores.model.prompt import Prompt, PromptError
from pruning.scores.model.scorer import Documents, ScoreError
from pruning.scores.model.text_prompt import TextPrompt

BYTES = Vocabulary("bytes", b"", 125)


@pytest.fixture(scope="module")
def t5(t5_vocabulary_file) -> Vocabulary:
    return Vocabulary.from_file(t5_vocabulary_file)


def tokens_of(documents: Documents, index: int) -> list[int]:
    return documents.tokens[documents.offsets[index] : documents.offsets[index + 1]].tolist()


# --------------------------------------------------------------------------------------------------
# The prompt


def test_the_prompt_is_the_papers():
    assert PROMPT.format(document="A paragraph.") == (
        "###\nA paragraph.\n###\n\nDoes the previous paragraph demarcated within ### and ### "
        "contain informative signal for pre-training a large-language model? An informative "
        "datapoint should be well-formatted, contain some usable knowledge of the world, and "
        "strictly NOT have any harmful, racist, sexist, etc. content.\n\nOPTIONS:\n- yes\n- no"
    )


def test_pieces_are_the_whole_on_real_text(t5, real_data):
    """All of C4's documents, and text of many scripts and much odd white space.

    Where ids differ, SentencePiece chose between segmentations of equal probability: as many ids,
    the same text, the same score.
    """
    texts = []
    for name in ("c4/c4_real_merged.jsonl.gz", "redpajama/sample_github1.jsonl.gz"):
        with gzip.open(real_data / "corpus" / name, "rt") as file:
            texts += [json.loads(line)["text"] for line in file]
    with gzip.open(real_data / "corpus" / "mixed" / "exllamav2_multilingual.utf8.gz", "rt") as file:
        texts += file.read().split("\n")
    texts = [text for text in texts if t5.encode(text)]
    prompt = Prompt.of(PROMPT, t5, end=(1,))
    longest = max(len(text) for text in texts) + len(prompt)
    parts, cut = prompt.around(Documents.of(t5.encode_batch(texts)), longest)
    assert not cut.any()
    wholes = t5.encode_batch([PROMPT.replace("{document}", text) for text in texts])
    differ = [i for i, whole in enumerate(wholes) if tokens_of(parts, i) != [*whole, 1]]
    assert len(differ) <= len(texts) / 1000
    scores = {i: t5._processor.GetScore(i) for i in range(t5.base_size)}
    for i in differ:
        part, whole = tokens_of(parts, i)[:-1], wholes[i]
        assert len(part) == len(whole)
        assert t5.decode(part) == t5.decode(whole)
        assert sum(map(scores.get, part)) == pytest.approx(sum(map(scores.get, whole)), rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        " leading", "trailing  ", "\n\nlines\n\n", "\u200bzero width", "\u0301combining", "###",
        "\u3000wide space\u3000", "日本語", "x 日本", "▁x▁", "a\u00a0b", "<extra_id_0>",
        "{document}", "# #",
        "\ufeffmark", "ﷺ", "½", "tab\tand\rreturn", "e\u0301", "\U0001f600", "\u2028x", "</s>",
    ],
)  # fmt: skip
def test_pieces_are_the_whole_at_odd_edges(t5, text):
    prompt = Prompt.of(PROMPT, t5)
    parts, _ = prompt.around(Documents.of([t5.encode(text)]), 1000)
    before, after = PROMPT.split("{document}")
    assert tokens_of(parts, 0) == t5.encode(before + text + after)


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=60), st.sampled_from(["{document}?", "Is '{document}' good?", "{document}"])
)
def test_pieces_are_the_whole_in_bytes(text, prompt):
    """A vocabulary of bytes needs no white space around the document."""
    parts, _ = Prompt.of(prompt, BYTES).around(Documents.of([BYTES.encode(text)]), 1000)
    assert tokens_of(parts, 0) == BYTES.encode(prompt.replace("{document}", text))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(3, 250), max_size=40), max_size=8), st.integers(21, 60))
def test_the_document_is_cut_and_never_the_question(documents, max_tokens):
    prompt = Prompt.of("ask {document} answer", BYTES, begin=(2,), end=(1,))
    assert len(prompt) == 13
    shown, cut = prompt.around(Documents.of(documents), max_tokens)
    for i, document in enumerate(documents):
        kept = min(len(document), max_tokens - 13)
        whole = [*prompt.prefix, *document[:kept], *prompt.suffix]
        assert tokens_of(shown, i) == whole
        assert cut[i] == len(document) - kept


def test_unfit_prompts_are_refused(t5):
    with pytest.raises(PromptError, match="0 times"):
        Prompt.of("no slot", t5)
    with pytest.raises(PromptError, match="2 times"):
        Prompt.of("{document} {document}", t5)
    with pytest.raises(PromptError, match="white space"):
        Prompt.of("'{document}'", t5)
    with pytest.raises(PromptError, match="leaves no room"):
        Prompt.of(PROMPT, t5).around(Documents.of([[5]]), 40)


def test_vocabularies_that_reach_across_white_space_encode_whole_texts(tmp_path, tiny_t5):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        input=__file__, model_prefix=str(tmp_path / "across"), vocab_size=500, model_type="bpe",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, split_by_whitespace=False, minloglevel=2,
    )  # fmt: skip
    across = Vocabulary.from_file(tmp_path / "across.model")
    with pytest.raises(VocabularyError, match="does not break at white space"):
        Prompt.of("a {document}", across)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "across.model"))
    prompt = AskLLM("the {document} is").prompt_ids(across, tiny_t5.model.config)
    assert isinstance(prompt, TextPrompt)
    texts = ["def test", "a  b\n\nc", "the prompt, tokens"]
    assert prompt.encode(texts) == [[*pieces.Encode(f"the {text} is"), 1] for text in texts]


def test_answers_are_single_tokens(t5, tiny_t5):
    with pytest.raises(VocabularyError, match="single token"):
        AskLLM(yes=("indubitably so",)).prepare(tiny_t5.model, t5)
    with pytest.raises(ValueError, match="both sides"):
        AskLLM(yes=("yes", "no")).prepare(tiny_t5.model, t5)


# --------------------------------------------------------------------------------------------------
# The numbers

QUESTION = AskLLM(prompt="q {document} a", yes=("y", "Y"), no=("n",), max_tokens=48)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=9),
    row_length=st.sampled_from([48, 96]),
    seed=st.integers(0, 1000),
)
def test_answers_are_the_plain_models(tiny_t5, lengths, row_length, seed):
    """Encoder over packed rows, one decoder position a document, yes in two spellings."""
    rng = np.random.default_rng(seed)
    documents = Documents.of([rng.integers(3, 259, n).tolist() for n in lengths])
    prepared = QUESTION.prepare(tiny_t5.model, BYTES)
    scores = _score(prepared, tiny_t5.params, documents, (row_length, 8))
    for i in range(len(documents)):
        tokens = tokens_of(documents, i)
        if not tokens:
            assert np.isnan(scores.columns["ask_llm_yes"][i])
            continue
        kept = tokens[: 48 - 5]  # "q ", " a" and EOS
        encoder = [*BYTES.encode("q "), *kept, *BYTES.encode(" a"), 1]
        log_p = tiny_t5.plain.decode(tiny_t5.plain.encode(encoder), [0])[0]
        yes = np.logaddexp(*log_p[[BYTES.token("y"), BYTES.token("Y")]])
        assert scores.columns["ask_llm_yes"][i] == pytest.approx(yes, rel=1e-5)
        assert scores.columns["ask_llm_no"][i] == pytest.approx(log_p[BYTES.token("n")], rel=1e-5)
        assert scores.columns["truncated_tokens"][i] == len(tokens) - len(kept)


@pytest.mark.parametrize("bos", [None, 2])
def test_decoder_only_judge(bos):
    """The answer is what follows the prompt's last token."""
    import jax

    from models.config import DecoderConfig
    from models.model import Model

    shape = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    model = Model(
        DecoderConfig(vocab_size=400, head_dim=16, bos_id=bos, logit_softcap=9.0, **shape)
    )
    params = jax.tree.map(lambda leaf: leaf * 3, jax.jit(model.init)(jax.random.key(1)))
    rng = np.random.default_rng(0)
    documents = Documents.of([rng.integers(3, 259, n).tolist() for n in (1, 30, 0, 7, 70, 12, 12)])
    prepared = QUESTION.prepare(model, BYTES)
    scores = _score(prepared, params, documents, (64, 8))
    log_p = jax.jit(lambda params, ids: jax.nn.log_softmax(model.bind(params).logits(
        model.bind(params).hidden(ids))))  # fmt: skip
    room = 48 - 4 - (bos is not None)
    for i in range(len(documents)):
        tokens = tokens_of(documents, i)
        if not tokens:
            continue
        whole = ([] if bos is None else [bos]) + BYTES.encode("q ") + tokens[:room]
        whole += BYTES.encode(" a")
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(whole)] = whole
        answer = np.asarray(log_p(params, padded))[0, len(whole) - 1]
        yes = np.logaddexp(*answer[[BYTES.token("y"), BYTES.token("Y")]])
        assert scores.columns["ask_llm_yes"][i] == pytest.approx(yes, rel=1e-5)
        assert scores.columns["ask_llm_no"][i] == pytest.approx(answer[BYTES.token("n")], rel=1e-5)


_COMPILED: dict = {}


def _score(prepared, params, documents, row_lengths):
    import jax

    windows = prepared.windows(documents)
    packed = packing.pack(windows.lengths, row_lengths)
    rows = {name: np.pad(r, ((0, 9 - len(r)), (0, 0))) for name, r in packed.fill(windows).items()}
    key = (prepared.sides, row_lengths)
    if prepared.sides[0] == "decoder" or key not in _COMPILED:
        _COMPILED[key] = jax.jit(prepared.step)
    answers = np.asarray(_COMPILED[key](params, rows))[: packed.num_rows]
    return prepared.finish(documents, windows, packed.gather(windows, answers))


def test_an_answer_without_spellings_is_refused():
    with pytest.raises(ScoreError, match="is empty"):
        AskLLM(yes=())


def test_spellings_with_one_token_count_once(t5, tiny_t5):
    """SentencePiece drops white space at either end."""
    scorer = AskLLM(yes=("yes", " yes", "yes"), no=("no",))
    plain = AskLLM().prepare(tiny_t5.model, t5)
    assert scorer.prepare(tiny_t5.model, t5).summary == plain.summary
