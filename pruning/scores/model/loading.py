"""Loading of a model's configuration and tokenizer, and of the corpus in its tokens.

Choices
- A model with a wrong tokenizer gives plausible but wrong numbers. The tokenizer is looked up in
  this order: the one given; the files beside the weights; for a training run that of its training
  corpus, or of the model that it was fine-tuned from. If there is none, it is an error; it is never
  guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from models import json_file
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.token_set import load_tokenized, read_with
from pruning.corpus.tokenizers import (
    JsonTokenizer,
    Tokenizer,
    holds_tokenizer,
    load_tokenizer,
    named,
    require_tokenizer,
)
from pruning.corpus.vocabulary import TextVocabulary, Vocabulary, VocabularyError
from pruning.store.manifest import MANIFEST

if TYPE_CHECKING:
    from models.config import ModelConfig

CORPUS = "corpus"  # value of `tokenizer`: the corpus's own


@functools.lru_cache(maxsize=4)
def find_tokenizer(model: str, given: str | None = None) -> Tokenizer:
    """Return the tokenizer of a model.

    Args:
      model: any argument of `models.weights.load`.
      given: an argument of `load_tokenizer`, or a corpus; None searches beside the weights.

    Raises:
      VocabularyError: there is none, it cannot be read, or it is not the one that the model was
        published with.
    """
    if given is None:
        if (own := _own(model)) is not None:
            return own
        raise VocabularyError(
            f"no tokenizer lies beside the model {model}: name the one that it was trained with "
            '(Score.tokenizer, Train.tokenizer, Inference.vocabulary), as a file, "bytes", a '
            "model's directory or a corpus."
        )
    found = _given(given)
    if model and (own := _own(model)) is not None and not _alike(own, found):
        raise VocabularyError(
            f"the tokenizer {given} is {named(found.describe())}, but the model {model} came with "
            f"{named(own.describe())}: leave the setting out, or take the model's tokenizer out of "
            "its directory if it is not the one that it was trained with."
        )
    return found


def _own(model: str) -> Tokenizer | None:
    """Return the tokenizer that accompanies a model."""
    from models import weights

    directory, kind = weights.locate(model)
    if holds_tokenizer(directory):
        return load_tokenizer(str(directory))
    return _of_run(directory) if kind == "run" else None


def _alike(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers have the same file; names of special tokens may differ."""
    if isinstance(first, JsonTokenizer) and isinstance(second, JsonTokenizer):
        return first.content == second.content
    return _same_ids(first, second)


def _given(path: str) -> Tokenizer:
    if path != "bytes" and (epath.Path(path) / MANIFEST).exists():
        manifest = json_file.read_object(epath.Path(path) / MANIFEST)
        if manifest.get("kind") == "corpus":
            return load_corpus(path).vocabulary
    return load_tokenizer(path)


def _of_run(directory: epath.Path) -> Tokenizer | None:
    """Return the tokenizer of a run's training corpus, or of its initial weights."""
    begun: dict[str, Any] = json_file.read_object(
        directory / "config.json", keys=("inputs", "train")
    )
    inputs = begun["inputs"].get("train", {})
    if (tokens := inputs.get("tokens")) and (epath.Path(tokens["path"]) / MANIFEST).exists():
        return load_tokenizer(tokens["path"])
    trained_on = inputs.get("corpus")
    if trained_on is not None and (epath.Path(trained_on["path"]) / MANIFEST).exists():
        return load_corpus(trained_on["path"]).vocabulary
    source = begun["train"].get("initial_weights")
    if source is None:
        return None
    given = begun["train"].get("tokenizer")  # "corpus": that of the data, not a corpus here
    return _own(source) if given == CORPUS else find_tokenizer(source, given)


def require_ids(
    model: str, described: Mapping[str, Any], what: str, given: str | None = None
) -> None:
    """Raise VocabularyError unless a model and some ids have the same tokenizer.

    Args:
      model: any argument of `models.weights.load`.
      described: the tokenizer that made the ids (`Tokenizer.describe`).
      what: name of the ids, for the message.
      given: tokenizer of a model whose directory has none; "corpus" for that of the ids.
    """
    if given != CORPUS:
        require_tokenizer(find_tokenizer(model, given), described, what, model)


def corpus_for(
    model: str,
    config: ModelConfig,
    corpus: Corpus,
    tokenizer: str | None = None,
    tokens: str | None = None,
) -> Corpus:
    """Return the corpus with the ids that a model reads.

    Args:
      model: any argument of `models.weights.load`.
      config: its configuration.
      corpus: the corpus, with its own tokens.
      tokenizer: tokenizer of a model whose directory has none; "corpus" for the corpus's own.
      tokens: a token set of the corpus; None tokenizes on reading if the corpus's own tokens are
        not the model's.

    Raises:
      VocabularyError: the tokenizer is unknown, or ids and model do not belong together.
      ArtifactError: the token set is of another corpus.
    """
    if tokenizer == CORPUS:
        needed = corpus.vocabulary
    else:
        needed = find_tokenizer(model, tokenizer)
    if tokens is not None:
        corpus = load_tokenized(corpus.artifact.path, tokens)
        require_tokenizer(needed, corpus.vocabulary.describe(), f"the token set {tokens}", model)
    if _same_ids(needed, corpus.vocabulary):
        needed = corpus.vocabulary
    require_size(model, config, needed)
    return read_with(corpus, needed)


def has_own_tokens(corpus: Corpus) -> bool:
    """Return whether a corpus is read with the vocabulary whose tokens it stores."""
    own: str = corpus.artifact.manifest.summary["vocabulary"]["digest"]
    return corpus.vocabulary.digest == own


def scorer_tokenizer(corpus: Corpus) -> Tokenizer:
    """Return the tokenizer with which a scorer for the corpus is prepared.

    Where the corpus does not store its tokens, it encodes prompts as whole texts.
    """
    tokenizer: Tokenizer = corpus.vocabulary
    if isinstance(tokenizer, Vocabulary) and not has_own_tokens(corpus):
        return TextVocabulary.of(tokenizer)
    return tokenizer


def require_size(model: str, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise VocabularyError if the tokenizer has more ids than the model."""
    if config.vocab_size < tokenizer.size:
        raise VocabularyError(
            f"the model {model} has {config.vocab_size:,} ids, its tokenizer {tokenizer.size:,}: "
            "they do not belong together. Give the tokenizer that the model was trained with."
        )


def _same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two SentencePiece vocabularies differ at most in their number of sentinels."""
    both = isinstance(first, Vocabulary) and isinstance(second, Vocabulary)
    return both and (first.kind, first.files()) == (second.kind, second.files())


def model_config(path: str) -> ModelConfig:
    """Return a model's configuration, without its weights."""
    from models import weights
    from models.published import NAMED
    from models.weights import winnow

    if path in NAMED:
        return NAMED[path]
    directory, kind = weights.locate(path)
    if kind == "run":
        return winnow.read_config(directory)
    return weights.look(directory, kind).config
