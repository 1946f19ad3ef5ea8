"""Judges with tokenizers of their own: scores equal to transformers', computed from text."""

from __future__ import annotations

import numpy as np
import pytest

from pruning.corpus import token_set
from pruning.corpus.token_set import TokenizeConfig
from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.store.manifest import ConfigurationChanged

torch = pytest.importorskip("torch", reason="compares with Hugging Face in PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

QUESTION = "Text:\n{document}\n\nIs it about a river? Answer yes or no:"
STYLES = ("llama3", "qwen", "gpt2", "gemma")


@pytest.fixture(scope="module", params=STYLES)
def judge(request, tiny_judge):
    """(style, directory, model, tokenizer) of a tiny random model as transformers saves it."""
    return tiny_judge(request.param)


def styles(*kept: str) -> pytest.MarkDecorator:
    """Judges of these styles; of the others, whose numbers the tests above compare, in a sweep."""
    others = [pytest.param(style, marks=pytest.mark.sweep) for style in STYLES if style not in kept]
    return pytest.mark.parametrize("judge", [*kept, *others], indirect=True)


@pytest.fixture(scope="module")
def corpus(make_corpus, english_texts, tmp_path_factory):
    """A corpus in a small SentencePiece vocabulary, which is none of the judges'."""
    rows = [{"text": text} for text in english_texts]
    return make_corpus(tmp_path_factory.mktemp("texts"), [rows[:25], rows[25:]])


def scored(corpus, path, output, scorer, **settings):
    scores = engine.run(
        ScoreConfig(
            corpus=str(corpus.artifact.path),
            output=str(output),
            scorer=scorer,
            model=str(path),
            row_length=1024,
            batch_rows=8,
            dtype="float32",
            compilation_cache=None,
            **settings,
        )
    )
    return {name: np.concatenate([scores.read(s)[name].to_numpy() for s in range(2)])
            for name in scores.read(0).column_names if name != "status"}  # fmt: skip


def log_probabilities(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()


def test_likelihood_is_that_of_the_text(judge, corpus, english_texts, tmp_path):
    style, path, model, tokenizer = judge
    found = scored(corpus, path, tmp_path / "nll", Likelihood("causal", 1000, 100))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for number, text in enumerate(english_texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        table = log_probabilities(model, [start, *ids])
        expected = -table[np.arange(len(ids)), ids].sum()
        assert found["n_scored_tokens"][number] == found["n_tokens"][number] == len(ids), style
        assert abs(found["nll"][number] / expected - 1) < 1e-5


@pytest.mark.parametrize("chat", [False, True])
def test_probabilities_of_answers_are_those_of_the_text(
    judge, corpus, english_texts, tmp_path, chat
):
    style, path, model, tokenizer = judge
    if chat and tokenizer.chat_template is None:
        pytest.skip("GPT-2 has no chat template")
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in ("y", "n"))
    scorer = AskLLM(QUESTION, ("y",), ("n",), max_tokens=900, chat=chat)
    found = scored(corpus, path, tmp_path / "ask", scorer)
    for number, text in enumerate(english_texts):
        prompt = QUESTION.replace("{document}", text)
        if chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True, enable_thinking=False, tokenize=False,
            )  # fmt: skip
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
        last = log_probabilities(model, ids)[-1]
        for name, answer in (("ask_llm_yes", yes), ("ask_llm_no", no)):
            assert abs(found[name][number] - last[answer[0]]) < 1e-5 * abs(last[answer[0]]), style


@styles("llama3", "gpt2")  # with BOS and without
def test_a_token_set_gives_the_scores_of_reading_along(judge, corpus, tmp_path):
    _, path, *_ = judge
    made = token_set.run(
        TokenizeConfig(str(corpus.artifact.path), str(path), str(tmp_path / "tokens"), workers=1)
    )
    scorer = Likelihood("causal", 256, 64)
    along = scored(corpus, path, tmp_path / "along", scorer)
    stored = scored(corpus, path, tmp_path / "stored", scorer, tokens=str(made.path))
    for name, values in along.items():
        assert np.array_equal(values, stored[name])


@styles("qwen")
def test_scores_by_another_tokenizer_are_other_work(judge, corpus, tokenizer_of, tmp_path):
    _, path, model, _ = judge
    bare = tmp_path / "bare"  # the model without a tokenizer
    model.save_pretrained(bare)
    scorer = Likelihood("causal", 256, 64)
    scored(corpus, bare, tmp_path / "nll", scorer, tokenizer=str(path))
    with pytest.raises(ConfigurationChanged, match="tokenizer"):
        scored(corpus, bare, tmp_path / "nll", scorer, tokenizer=str(tokenizer_of("phi")))


@styles("llama3", "gpt2")  # with BOS and without
def test_long_documents_are_cut_and_estimated_in_their_prompts(
    judge, make_corpus, english_texts, tmp_path
):
    """A document longer than a row: its prompt is what is packed and reckoned with."""
    _, path, _, tokenizer = judge
    long = " ".join(english_texts)  # several thousand tokens
    corpus = make_corpus(tmp_path / "long", [[{"text": long}], [{"text": english_texts[0]}]])
    scorer = AskLLM(QUESTION, ("y",), ("n",), max_tokens=128)
    found = scored(corpus, path, tmp_path / "ask", scorer)
    total = len(tokenizer(long, add_special_tokens=False)["input_ids"])
    assert total > 1024
    assert total - 128 < found["truncated_tokens"][0] < total
    assert np.isfinite(found["ask_llm_yes"]).all()
