"""Tokenizers of models: the ids of transformers, on real text and on hostile strings."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle

import numpy as np
import pytest

from pruning.corpus import token_set
from pruning.corpus.reader import load_corpus
from pruning.corpus.token_set import TokenizeConfig, load_tokenized, read_with
from pruning.corpus.tokenizers import (
    JsonTokenizer,
    holds_tokenizer,
    load_tokenizer,
    require_tokenizer,
)
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.data.objectives import CausalLM
from pruning.data.stream import StreamConfig
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Random
from pruning.store.manifest import ArtifactError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

HOSTILE = [
    "<|im_end|> <|eot_id|><s>[INST] <eos> </s> <|end|> [SEP] <|endoftext|>",
    "zero\0byte",
    "  leading and trailing \n\n",
    "",
    " ",
    "ﷺ e\u0301 漢字 🙂\u200d🙂 \u202eright to left",
    "x" * 100_000,
]


@pytest.fixture(scope="module")
def documents(english_texts) -> list[str]:
    return english_texts


@pytest.fixture(
    scope="module", params=["gpt2", "llama3", "qwen", "gemma", "mistral", "phi", "bert"]
)
def saved(request, tokenizer_of):
    return request.param, tokenizer_of(request.param)


def test_ids_are_those_of_transformers(saved, documents):
    style, path = saved
    ours, theirs = load_tokenizer(str(path)), transformers.AutoTokenizer.from_pretrained(path)
    assert isinstance(ours, JsonTokenizer) and ours.size == len(theirs)
    for text in [*documents, *HOSTILE]:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected, (style, text[:80])
        assert not set(ours.encode(text)) & set(ours.special_ids()) - {ours.unknown_id}
    assert ours.encode_batch(documents) == [ours.encode(text) for text in documents]
    framed = theirs(documents[0])["input_ids"]
    assert ours.encode_framed(documents[0]) == framed
    assert ours.eos_id == theirs.eos_token_id and ours.bos_id == theirs.bos_token_id


def test_real_multilingual_text_has_the_ids_of_transformers(saved, real_data):
    style, path = saved
    ours, theirs = load_tokenizer(str(path)), transformers.AutoTokenizer.from_pretrained(path)
    texts = []
    with gzip.open(real_data / "corpus/c4/llamafactory_c4_demo.jsonl.gz", "rt") as file:
        texts += [json.loads(line)["text"] for line in file][:300]
    with gzip.open(real_data / "corpus/mixed/exllamav2_multilingual.utf8.gz", "rt") as file:
        whole = file.read()
        texts += [whole[i : i + 2000] for i in range(0, len(whole), 2000)]
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = ours.encode_batch(texts)
    assert [a == b for a, b in zip(found, expected, strict=True)].count(False) == 0, style


def test_bytes_of_tokens_add_up_to_the_text(saved, documents):
    style, path = saved
    ours = load_tokenizer(str(path))
    if style == "bert":
        pytest.skip("BERT's tokenizer drops case and white space")
    sizes = ours.token_bytes()
    for text in documents[:50]:
        prefix = 1 if style in ("mistral", "phi") else 0  # the space that is put in front
        assert sizes[ours.encode(text)].sum() == len(text.encode()) + prefix


def test_the_beginning_of_a_text_has_its_first_tokens(saved, documents):
    _, path = saved
    ours = load_tokenizer(str(path))
    for text in documents[:20]:
        ids = ours.encode(text)
        begin = ours.prefix_of(text, len(ids) // 2)
        assert text.startswith(begin) and begin != text
        assert abs(len(ours.encode(begin)) - len(ids) // 2) <= 2
        assert ours.prefix_of(text, len(ids)) == text


def test_a_tokenizer_is_known_by_its_file_and_special_tokens(tokenizer_of, tmp_path):
    first = load_tokenizer(str(tokenizer_of("qwen")))
    again = pickle.loads(pickle.dumps(first))
    assert again.digest == first.digest and again.encode("a river") == first.encode("a river")
    for name, content in first.files().items():
        (tmp_path / name).write_bytes(content)
    assert holds_tokenizer(tmp_path) and load_tokenizer(str(tmp_path)) == first
    other = JsonTokenizer(first.content, {**first.special, "eos": "<|im_start|>"})
    assert other.digest != first.digest
    with pytest.raises(VocabularyError, match="the same numbers would mean other words"):
        require_tokenizer(first, other.describe(), "the corpus", "runs/model")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b"", b"{" * 100_000, b"\xff\xfe"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(VocabularyError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(VocabularyError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path.parent))


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "wordlevel", "bpe"])
def test_models_that_hold_special_pieces_do_not_find_them_in_documents(kind):
    models, pre_tokenizers = tokenizers.models, tokenizers.pre_tokenizers
    special = ["<unk>", "[CLS]", "</s>"]
    words = ["▁a", "▁", *"a<>/s[]CL", "</", "##a"]
    vocab = {piece: i for i, piece in enumerate([*special, *words])}
    if kind == "unigram":
        scored = [(piece, 0.0 if piece in special else -1.1 - i) for piece, i in vocab.items()]
        model = models.Unigram(scored, unk_id=0)
    elif kind == "wordpiece":
        model = models.WordPiece(vocab, unk_token="<unk>")
    elif kind == "wordlevel":
        model = models.WordLevel(vocab, unk_token="<unk>")
    else:
        model = models.BPE(vocab, [("<", "/")], unk_token="<unk>", ignore_merges=True)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = (
        pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.WhitespaceSplit()
    )
    plain = JsonTokenizer(library.to_str().encode(), {"unk": "<unk>"})
    library.add_special_tokens(special)
    content = library.to_str().encode()
    ours = JsonTokenizer(content, {"unk": "<unk>"})
    texts = ["a </s>", "a [CLS]", "a</s>", "</s>", "a <unk> [CLS]</s> a"]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == ours.encode(text) == ours.encode_renamed(text)
        assert set(ids) & set(ours.special_ids()) <= {0} and len(ids) > 0
        assert len(ours.token_ends(text)) == len(ids) and ours.token_ends(text)[-1] == len(text)
        assert ours.prefix_of(text, len(ids)) == text
    assert any(set(plain.encode(text)) & {1, 2} for text in texts)  # what the model would find
    library.encode_special_tokens = True
    for text in ["a", "a s/ C[", " < a"]:
        assert ours.encode(text) == library.encode(text).ids
        assert ours.token_ends(text) == [end for _, end in library.encode(text).offsets]
    head = json.dumps({"unk": "<unk>"}).encode()
    assert ours.digest == hashlib.sha256(b"json-renamed:" + head + b":" + content).hexdigest()


def test_other_models_keep_their_digest(saved):
    style, path = saved
    ours = load_tokenizer(str(path))
    head = json.dumps(dict(sorted(ours.special.items()))).encode()
    kept = hashlib.sha256(b"json:" + head + b":" + ours.content).hexdigest()
    assert (ours.digest == kept) == (style != "bert")


def test_a_token_set_is_the_corpus_in_other_tokens(make_corpus, records, tokenizer_of, tmp_path):
    corpus = make_corpus(tmp_path / "in", [records(70, 1), [], records(40, 2)])
    path = str(corpus.artifact.path)
    made = token_set.run(
        TokenizeConfig(path, str(tokenizer_of("gpt2")), str(tmp_path / "tokens"), workers=2)
    )
    tokenizer = load_tokenizer(str(tokenizer_of("gpt2")))
    stored, live = load_tokenized(path, made.path), read_with(corpus, tokenizer)
    assert stored.vocabulary.digest == live.vocabulary.digest == tokenizer.digest
    assert read_with(corpus, corpus.vocabulary) is corpus
    for shard in range(3):
        texts = corpus.columns(shard, ["text"])["text"].to_pylist()
        expected = tokenizer.encode_batch(texts)
        for view in (stored, live):
            table = view.columns(shard, ["n_tokens", "tokens", "doc_id"])
            assert table["tokens"].to_pylist() == expected
            assert table["n_tokens"].to_pylist() == list(map(len, expected))
            batches = view.iter_batches(shard, ["doc_id", "tokens"], 16)
            rows = [row for batch in batches for row in batch.column("tokens").to_pylist()]
            assert rows == expected
            some = np.array([len(texts) - 1, 0, 3]) if texts else np.array([], np.int64)
            assert [t.tolist() for t in view.tokens_of(shard, some)] == [expected[i] for i in some]
    assert made.manifest.tokens == sum(
        int(live.columns(s, ["n_tokens"])["n_tokens"].to_numpy().sum()) for s in range(3)
    )
    other = make_corpus(tmp_path / "other", [records(5, 3)])
    with pytest.raises(ArtifactError, match="was made from the corpus"):
        load_tokenized(other.artifact.path, made.path)


def test_training_reads_the_token_set(make_corpus, records, tokenizer_of, tmp_path):
    """Every token of the chosen documents once an epoch, whole corpus or selection."""
    corpus = make_corpus(tmp_path / "in", [records(70, 1), [], records(40, 2)])
    path = str(corpus.artifact.path)
    select.run(SelectConfig(path, str(tmp_path / "some"), Random(), keep_tokens=0.5))
    tokens = str(tmp_path / "tokens")
    token_set.run(TokenizeConfig(path, str(tokenizer_of("gpt2")), tokens, workers=1))
    tokenizer = load_tokenizer(str(tokenizer_of("gpt2")))
    for selection in (None, str(tmp_path / "some")):
        stream = StreamConfig(
            path, 4, selection, CausalLM(), input_length=32, target_length=32, tokens=tokens
        ).stream()
        found = [stream.blocks.read(block) for block in range(len(stream.blocks))]
        ids = np.concatenate([ids for ids, _ in found])
        texts = {
            doc_id: text
            for shard in range(3)
            for doc_id, text in zip(
                *corpus.columns(shard, ["doc_id", "text"]).to_pydict().values(), strict=True
            )
        }
        assert 0 < len(ids) <= len(texts) and (len(ids) == len(texts)) == (selection is None)
        read = [row.tolist() for _, rows in found for row in rows]
        assert read == tokenizer.encode_batch([texts[doc_id] for doc_id in ids.tolist()])
        assert stream.blocks.n_tokens.sum() == sum(map(len, read))
        assert set(stream.inputs) == {"corpus", "tokens"} | ({"selection"} if selection else set())


def test_a_corpus_can_be_ingested_with_any_tokenizer(make_corpus, records, tokenizer_of, tmp_path):
    rows = records(30, 4)
    corpus = make_corpus(tmp_path / "in", [rows], vocabulary=str(tokenizer_of("llama3")))
    opened = load_corpus(corpus.artifact.path)
    assert opened.vocabulary == load_tokenizer(str(tokenizer_of("llama3")))
    tokens = opened.columns(0, ["tokens"])["tokens"].to_pylist()
    assert tokens == opened.vocabulary.encode_batch([row["text"] for row in rows])


def test_models_without_a_file_read_bytes(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(str(tmp_path)) == Vocabulary("bytes", b"", 125)
