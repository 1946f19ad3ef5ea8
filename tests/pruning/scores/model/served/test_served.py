"""Judges behind llama.cpp's server: scores equal those of the same model, loaded here."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.rubric import Question, Rubric
from pruning.scores.model.scorer import ScoreError
from pruning.scores.model.served import chunks, judging, server
from pruning.scores.model.served.server import Connection, Server, ServerError
from pruning.store.artifact import load_artifact
from pruning.store.manifest import ConfigurationChanged

pytest.importorskip("torch", reason="the tiny model is made by transformers")
pytest.importorskip("transformers", reason="the tiny model is made by transformers")

MODEL = "tiny-qwen"
KEY = "sk-test-0123456789"
ALL = 900  # ids of the tiny model
WORDS = (("a", "A"), (" the",))  # spellings of yes and no
ASK = "Text:\n{document}\n\nIs it about a river? Answer yes or no:"
# The answers have one token and several, and several spellings.
RUBRIC = (
    Question(
        "river",
        {"yes": ("yes", "Yes"), "no": ("no", "not at all"), "maybe": ("perhaps, yes",)},
        "Text:\n{document}\n\nIs it about a river?",
        weights={"yes": 1, "no": 0, "maybe": 0.25},
    ),
    Question(
        "garden",
        {"0": ("0",), "1": ("1", "One garden."), "2": ("2 or more",)},
        "Text:\n{document}\n\nHow many gardens are in it?",
    ),
)


@pytest.fixture(scope="module")
def corpus(make_corpus, english_texts, tmp_path_factory):
    rows = [{"text": text} for text in english_texts[:22]]
    rows += [{"text": "A stop.<|im_end|>\n<|im_start|>user"}, {"text": ""}]
    return make_corpus(tmp_path_factory.mktemp("texts"), [rows[:14], rows[14:]])


def scored(corpus, output, scorer, model, **settings):
    scores = engine.run(
        ScoreConfig(
            corpus=str(corpus.artifact.path),
            output=str(output),
            scorer=scorer,
            model=str(model),
            dtype="float32",
            compilation_cache=None,
            **settings,
        )
    )
    parts = [scores.read(shard) for shard in range(2)]
    columns = {
        name: [value for part in parts for value in part[name].to_pylist()]
        for name in parts[0].column_names
    }
    return columns, scores


def asked(corpus, output, scorer, endpoint, top=ALL, **settings):
    of_server = {
        k: settings.pop(k) for k in ("attempts", "timeout", "concurrency") if k in settings
    }
    server = Server(endpoint, top=top, **of_server)
    return scored(corpus, output, scorer, MODEL, server=server, **settings)


def largest_difference(served: dict, local: dict) -> float:
    """Return the largest difference of numbers in the columns of both; other values are equal.

    Relative, as float32 is: log-probabilities near -16 are sums of some. Below 1 absolute.
    """
    largest = 0.0
    for name, values in local.items():
        for ours, theirs in zip(served[name], values, strict=True):
            if isinstance(theirs, float | list):
                found, wanted = np.asarray(ours), np.asarray(theirs)
                assert found.shape == wanted.shape
                apart = np.abs(found - wanted) / np.maximum(1, np.abs(wanted))
                largest = max(largest, float(apart.max(initial=0.0)))
            else:
                assert ours == theirs
    return largest


@pytest.mark.parametrize(
    "scorer",
    [
        AskLLM(ASK, *WORDS, max_tokens=160, chat=True, system="Be brief."),
        Rubric(RUBRIC, max_tokens=90, windows=3, keep_windows=True),
        Rubric(RUBRIC[1:], max_tokens=90, windows=2, aggregate="min"),
    ],
    ids=["ask_llm", "rubric", "minimum"],
)
def test_scores_equal_those_of_the_model_loaded_here(
    scorer, corpus, endpoint, tiny_judge, tmp_path
):
    _, path, *_ = tiny_judge("qwen")
    local, _ = scored(corpus, tmp_path / "local", scorer, path)
    served, scores = asked(corpus, tmp_path / "served", scorer, endpoint, tokenizer=str(path))
    assert local.keys() - served.keys() <= {"n_tokens"}
    assert largest_difference(served, {k: v for k, v in local.items() if k in served}) < 5e-6
    assert all(not value for k, v in served.items() if k.endswith("_unlisted") for value in v)
    counts = scores.manifest.counts
    assert counts["bounded"] == 0 and counts["requests"] >= 23 and counts["prompt_tokens"] > 1000


@pytest.mark.parametrize("chat", [False, True])
def test_the_server_tokenizes_texts_where_no_tokenizer_is_given(
    chat, corpus, endpoint, tiny_judge, tmp_path
):
    _, path, *_ = tiny_judge("qwen")
    scorer = AskLLM(ASK, *WORDS, max_tokens=2000, chat=chat)
    local, _ = asked(corpus, tmp_path / "ids", scorer, endpoint, tokenizer=str(path))
    served, _ = asked(corpus, tmp_path / "texts", scorer, endpoint)
    plain = [i for i, text in enumerate(_texts(corpus)) if "<|" not in text]
    for name in ("ask_llm_yes", "ask_llm_no", "status"):
        local[name], served[name] = ([of[name][i] for i in plain] for of in (local, served))
    names = ("ask_llm_yes", "ask_llm_no", "status")
    assert largest_difference(served, {name: local[name] for name in names}) < 5e-6


def _texts(corpus) -> list[str]:
    parts = [corpus.artifact.read(shard, ["text"]) for shard in range(2)]
    return [text for part in parts for text in part["text"].to_pylist()]


@pytest.mark.parametrize("words", [1, 40])
def test_texts_are_cut_between_words_to_windows_of_the_corpus_tokens(words, corpus):
    vocabulary = corpus.vocabulary
    from pruning.scores.model.served.prompts import _cut

    def count(text):
        return len(vocabulary.encode(text))

    for text in [*_texts(corpus), "no" * 400 + " end", " \n", "x"]:
        parts = _cut(text, 3 * words, count)
        assert "".join(part for part, _ in parts) == text
        assert all(count(part) <= 3 * words for part, _ in parts)


def test_a_word_of_any_length_is_cut_in_linear_time():
    from pruning.scores.model.served.prompts import _cut

    counted = 0

    def count(text):
        nonlocal counted
        counted += len(text)
        return -(-len(text) // 3) + 1

    word = "".join(map(str, range(20_000)))
    parts = _cut(word, 50, count)
    assert "".join(part for part, _ in parts) == word
    assert all(count(part) <= 50 for part, _ in parts) and counted < 12 * len(word)


def test_answers_that_are_not_listed_have_upper_bounds_or_a_status(
    corpus, endpoint, tiny_judge, tmp_path
):
    _, path, *_ = tiny_judge("qwen")
    scorer = Rubric(RUBRIC[:1], max_tokens=200)
    exact, _ = asked(corpus, tmp_path / "exact", scorer, endpoint, tokenizer=str(path))
    found, scores = asked(corpus, tmp_path / "few", scorer, endpoint, top=700, tokenizer=str(path))
    seen = set()
    for i, status in enumerate(found["status"]):
        if exact["status"][i] != "ok":
            assert status == exact["status"][i]
            continue
        seen.add(status)
        if status == "not_listed":
            assert found["river_yes"][i] is None and found["river_expected"][i] is None
            continue
        gap = 0.0
        for answer in ("yes", "no", "maybe"):
            bound, true = found[f"river_{answer}"][i], exact[f"river_{answer}"][i]
            assert bound >= true - 2e-5
            gap += np.exp(bound) - np.exp(true)
        assert found["river_unlisted"][i] >= gap - 1e-5
    assert seen == {"ok", "not_listed"}
    counts = scores.manifest.counts
    assert counts["documents"]["not_listed"] == found["status"].count("not_listed")
    assert 0 < counts["bounded"] <= counts["documents"]["ok"]


def test_faults_of_the_server_are_survived(corpus, proxy, tiny_judge, tmp_path, monkeypatch):
    _, path, *_ = tiny_judge("qwen")
    scorer = AskLLM(ASK, *WORDS, max_tokens=160)
    whole, plain = asked(corpus, tmp_path / "plain", scorer, proxy.endpoint, tokenizer=str(path))
    asked_once = len(proxy.requests)
    faults = {
        3: (429, {"Retry-After": "0.2"}, b'{"error": {"message": "slow down"}}'),
        5: (500, {}, b"oh"),
        8: (503, {}, b'{"error": "loading"}'),
        9: "close",
        11: "hang",
        14: (200, {}, b"<html>a gateway's page</html>"),
        17: (502, {}, b""),
    }
    proxy.requests.clear()
    proxy.most = 0
    proxy.fault = lambda number, body: faults.get(number)
    found, scores = asked(
        corpus, tmp_path / "faults", scorer, proxy.endpoint,
        timeout=5.0, concurrency=3, tokenizer=str(path),
    )  # fmt: skip
    assert largest_difference(found, whole) < 5e-6
    assert proxy.most <= 4  # the one that hangs is still counted when it is asked again
    assert len(proxy.requests) == asked_once + len(faults)
    assert scores.manifest.counts == plain.manifest.counts
    measured = json.loads((scores.path / "measured.json").read_text())
    assert measured["retries"] == len(faults)


def test_a_limit_of_requests_makes_no_document_fail(corpus, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_DELAY", 0.1)
    answer = {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": -0.1}]}}]}
    fine, slow = json.dumps(answer).encode(), b'{"error": "slow down"}'
    last = 0.0

    def at_most_20_a_second(number, body):
        nonlocal last
        if (now := time.monotonic()) < last + 0.05:
            return 429, {}, slow
        last = now
        return 200, {}, fine

    proxy.fault = at_most_20_a_second
    scorer = AskLLM(ASK, *WORDS, max_tokens=2000)
    found, _ = asked(corpus, tmp_path / "out", scorer, proxy.endpoint, concurrency=8, attempts=3)
    assert found["status"].count("ok") == 23 and len(proxy.requests) > 3 * 23
    proxy.fault = lambda number, body: (429, {}, slow)
    with pytest.raises(ServerError, match="does not answer: HTTP 429: slow down"):
        asked(corpus, tmp_path / "none", scorer, proxy.endpoint, attempts=3)


def test_a_killed_run_asks_again_only_about_unfinished_chunks(
    corpus, proxy, tiny_judge, tmp_path, monkeypatch
):
    monkeypatch.setattr(chunks, "CHUNK", 4)
    monkeypatch.setattr(judging, "CHUNK", 4)
    _, path, *_ = tiny_judge("qwen")
    scorer = AskLLM(ASK, *WORDS, max_tokens=160)
    settings = {"concurrency": 2, "attempts": 1, "tokenizer": str(path)}
    whole, plain = asked(corpus, tmp_path / "plain", scorer, proxy.endpoint, **settings)
    first_contact = 1
    proxy.requests.clear()
    proxy.fault = lambda number, body: (500, {}, b"gone") if number > 11 else None
    for _ in range(2):
        with pytest.raises(ServerError, match=r"no longer answers.*run the same command again"):
            asked(corpus, tmp_path / "killed", scorer, proxy.endpoint, **settings)
        begun = len(proxy.requests)
        proxy.fault = lambda number, body, b=begun: (500, {}, b"gone") if number > b + 9 else None
    proxy.fault = lambda number, body: None
    found, scores = asked(corpus, tmp_path / "killed", scorer, proxy.endpoint, **settings)
    assert largest_difference(found, whole) < 5e-6  # the server's batches change last bits
    assert scores.manifest.counts == plain.manifest.counts
    again = len(proxy.requests) - begun - first_contact
    assert again < 23 - 8  # two chunks at least were answered before


def test_a_document_that_the_server_refuses_is_a_failed_document(corpus, proxy, tmp_path, capsys):
    scorer = AskLLM(ASK, *WORDS, max_tokens=2000)
    poison = json.dumps(_texts(corpus)[3])[1:30].encode()

    def fault(number, body):
        if poison in body:
            message = b'{"error": {"message": "maximum context length\\nis 4"}}'
            return 400, {}, message
        return None

    proxy.fault = fault
    found, _ = asked(corpus, tmp_path / "scores", scorer, proxy.endpoint)
    assert found["status"][3] == "failed" and found["ask_llm_yes"][3] is None
    assert found["status"].count("ok") == 22
    said = capsys.readouterr().err
    assert re.search(r'document 3 of .* gets the status "failed": HTTP 400: maximum context', said)
    trivial = rb"Text:\na\n"
    for refused, match in (
        (lambda body: trivial not in body, "the server refuses every document: HTTP 400"),
        (lambda body: True, r"no longer answers \(HTTP 400"),  # such as without the model
    ):
        proxy.fault = lambda n, body, of=refused: (400, {}, b"{}") if n > 60 and of(body) else None
        proxy.requests = proxy.requests[:1] * 60
        with pytest.raises(ServerError, match=match):
            asked(corpus, tmp_path / "all", scorer, proxy.endpoint)


def test_answers_are_known_by_their_texts_without_a_tokenizer(corpus, proxy, tmp_path):
    def like_vllm(number, body):
        numbered = "return_tokens_as_token_ids" in json.loads(body)
        likely = {"token_id:5": -0.1, "token_id:6": -3.0} if numbered else {"a": -0.1, " the": -3.0}
        listed = {"tokens": [next(iter(likely))], "top_logprobs": [likely]}
        return 200, {}, json.dumps({"choices": [{"logprobs": listed}]}).encode()

    proxy.fault = like_vllm
    scorer = AskLLM(ASK, *WORDS, max_tokens=2000)
    found, _ = asked(corpus, tmp_path / "scores", scorer, proxy.endpoint)
    assert found["status"].count("ok") == 23
    assert found["ask_llm_no"][0] == pytest.approx(-3.0) and found["ask_llm_yes"][0] >= -0.1


def test_what_does_not_fit_is_refused_in_one_line(corpus, endpoint, proxy, tiny_judge, tmp_path):
    _, path, *_ = tiny_judge("qwen")
    _, other, *_ = tiny_judge("llama3")
    scorer = AskLLM(ASK, *WORDS, max_tokens=160)

    def refused(match, endpoint=endpoint, model=MODEL, tokenizer=str(path), scorer=scorer, **more):
        with pytest.raises(ScoreError, match=match) as found:
            server = Server(endpoint, attempts=1, **more)
            scored(corpus, tmp_path / "refused", scorer, model, server=server, tokenizer=tokenizer)
        assert "\n" not in str(found.value)

    refused("no server answers at http://127.0.0.1:1/v1", endpoint="http://127.0.0.1:1")
    refused("has no model 'other'; it serves: tiny-qwen", model="other")
    refused("is not the one of the model at", tokenizer=str(other))
    refused("a served judge's tokenizer is a tokenizer.json", tokenizer="corpus")
    refused("is a URL such as", endpoint="localhost:8000")
    refused("must not contain a user name", endpoint="http://me:secret@localhost/v1")
    proxy.fault = lambda number, body: (400, {}, b'{"detail": "at most 20 logprobs"}')
    refused("refuses a question: HTTP 400: at most 20 logprobs", endpoint=proxy.endpoint, top=50)
    bare = b'{"choices": [{"text": "a", "index": 0, "logprobs": null}]}'
    proxy.fault = lambda number, body: (200, {}, bare)
    refused("gives no log-probabilities of tokens", endpoint=proxy.endpoint)
    proxy.fault = lambda number, body: (500, {}, b"")
    refused("does not answer: HTTP 500: without a message", endpoint=proxy.endpoint)
    assert not (tmp_path / "refused").exists()


def test_a_model_of_another_name_is_another_judge(corpus, endpoint, tiny_judge, tmp_path):
    _, path, *_ = tiny_judge("qwen")
    scorer = AskLLM(ASK, *WORDS, max_tokens=160)
    asked(corpus, tmp_path / "scores", scorer, endpoint, tokenizer=str(path))
    for change in ({"top": 400}, {"tokenizer": None}):
        with pytest.raises(ConfigurationChanged):
            settings = {"tokenizer": str(path)} | change
            asked(corpus, tmp_path / "scores", scorer, endpoint, **settings)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    corpus, with_key, tiny_judge, tmp_path, monkeypatch, capsys
):
    _, path, *_ = tiny_judge("qwen")
    scorer = AskLLM(ASK, *WORDS, max_tokens=160)
    settings = {"attempts": 1, "tokenizer": str(path)}
    monkeypatch.setenv("WINNOW_API_KEY", f"{KEY}-wrong")
    with pytest.raises(ServerError, match="refuses the key in the environment variable") as error:
        asked(corpus, tmp_path / "scores", scorer, with_key, **settings)
    assert KEY not in str(error.value)
    monkeypatch.setenv("WINNOW_API_KEY", KEY)
    found, _ = asked(corpus, tmp_path / "scores", scorer, with_key, **settings)
    assert found["status"].count("ok") == 23
    said = capsys.readouterr()
    files = [file for file in (tmp_path / "scores").rglob("*") if file.is_file()]
    assert files and not any(KEY.encode() in file.read_bytes() for file in files)
    assert KEY not in said.out + said.err


def test_a_dry_run_asks_about_a_sample(corpus, proxy, tiny_judge, tmp_path, capsys):
    _, path, *_ = tiny_judge("qwen")
    scorer = AskLLM(ASK, *WORDS, max_tokens=160)
    _, scores = asked(corpus, tmp_path / "scores", scorer, proxy.endpoint, tokenizer=str(path))
    capsys.readouterr()
    config = ScoreConfig(
        str(corpus.artifact.path), str(tmp_path / "dry"), scorer, MODEL, dry_run=True,
        server=Server(proxy.endpoint, top=ALL), tokenizer=str(path),
    )  # fmt: skip
    assert engine.run(config) is None and not (tmp_path / "dry").exists()
    said = capsys.readouterr().out
    estimated = int(re.search(r"prompt tokens: ([\d,]+)", said)[1].replace(",", ""))
    # The corpus is smaller than the sample, so that the estimate is exact.
    assert estimated == pytest.approx(scores.manifest.counts["prompt_tokens"], rel=1 / 23)
    assert "time: " in said and "answers not listed: for 0 of 23" in said


def test_requests_wait_as_long_as_the_server_asks(proxy):
    proxy.fault = lambda n, body: (429, {"Retry-After": "1"}, b"{}") if n == 0 else (200, {}, b"{}")
    connection = Connection(Server(proxy.endpoint, attempts=2))
    started = time.perf_counter()
    assert connection.post("/completions", {}) == {}
    assert time.perf_counter() - started >= 1.0 and connection.retries == 1


def test_a_scorer_that_asks_nothing_is_refused(corpus, endpoint, tmp_path):
    from pruning.scores.model.likelihood import Likelihood

    with pytest.raises(ScoreError, match=r"Likelihood cannot be asked of a server"):
        asked(corpus, tmp_path / "scores", Likelihood("causal"), endpoint)
    assert load_artifact(corpus.artifact.path)
