"""Rubrics: every answer's log-probability equals that of transformers, computed from text."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from models import packing
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.rubric import Question, Rubric
from pruning.scores.model.scorer import Documents, ScoreError

torch = pytest.importorskip("torch", reason="compares with Hugging Face in PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

BYTES = Vocabulary("bytes", b"", 125)
# The answers have one token and several, several spellings, and one that is named twice.
QUESTIONS = (
    Question(
        "river",
        {"yes": ("yes", "Yes", "yes"), "no": ("no", "not at all"), "maybe": ("perhaps, yes",)},
        "Text:\n{document}\n\nIs it about a river?",
        weights={"yes": 1, "no": 0, "maybe": 0.25},
    ),
    Question(
        "garden",
        {"0": ("0",), "1": ("1", "One garden."), "2": ("2 or more",)},
        "Text:\n{document}\n\nHow many gardens are in it?",
    ),
    Question(
        "first", {"1": ("a",), "2": ("b",)}, "How good is it, a or b? {document}\nMy answer is"
    ),
    Question("teacher", {"5": ("5",), "3": ("3",)}, "Text:\n{document}? Rate the teacher."),
)
CHAT = {"llama3": True, "qwen": False, "gpt2": False, "mistral": True}


@pytest.fixture(scope="module")
def corpus(make_corpus, english_texts, tmp_path_factory):
    rows = [{"text": text} for text in english_texts[:8]]
    rows.append({"text": "A stop.<|im_end|><|eot_id|> \n"})
    return make_corpus(tmp_path_factory.mktemp("texts"), [rows[:4], rows[4:]])


@pytest.fixture(scope="module", params=CHAT)
def judge(request, tiny_judge):
    """(style, directory, model, tokenizer) of a tiny random model as transformers saves it."""
    return tiny_judge(request.param)


def scored(corpus, path, output, scorer, row_length=1024, **settings):
    scores = engine.run(
        ScoreConfig(
            corpus=str(corpus.artifact.path),
            output=str(output),
            scorer=scorer,
            model=str(path),
            row_length=row_length,
            batch_rows=8,
            dtype="float32",
            compilation_cache=None,
            **settings,
        )
    )
    parts = [scores.read(shard) for shard in range(2)]
    return {
        name: [value for part in parts for value in part[name].to_pylist()]
        for name in parts[0].column_names
    }


def texts_of(corpus) -> list[str]:
    parts = [corpus.artifact.read(shard, ["text"]) for shard in range(2)]
    return [text for part in parts for text in part["text"].to_pylist()]


def reference(model, tokenizer, question, text, chat) -> dict[str, float]:
    """The columns of a question, each spelling computed in a text of its own."""
    prompt = question.prompt.replace("{document}", text)
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True, enable_thinking=False, tokenize=False,
        )  # fmt: skip
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    found = {}
    for answer, spellings in question.answers.items():
        log_p = []
        for own in {tuple(tokenizer(s, add_special_tokens=False)["input_ids"]) for s in spellings}:
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *own]])).logits[0].double()
            table = torch.log_softmax(logits[len(ids) - 1 : -1], -1)
            log_p.append(table[torch.arange(len(own)), torch.tensor(own)].sum().item())
        found[f"{question.name}_{answer}"] = np.logaddexp.reduce(log_p)
    p = np.exp(list(found.values()))
    weights = [question.weights[answer] for answer in question.answers]
    found[f"{question.name}_expected"] = float(p @ weights / p.sum())
    found[f"{question.name}_none"] = 1 - p.sum()
    return found


def close(found: float, expected: float) -> bool:
    return abs(found - expected) < 1e-5 * max(1.0, abs(expected))


def test_every_answer_is_that_of_the_text(judge, corpus, tmp_path):
    style, path, model, tokenizer = judge
    chat = CHAT[style]
    rubric = Rubric(QUESTIONS, max_tokens=900, chat=chat)
    found = scored(corpus, path, tmp_path / "rubric", rubric)
    assert found["status"] == ["ok"] * len(found["status"])
    for number, text in enumerate(texts_of(corpus)):
        if "<|" in text:
            continue  # transformers takes special tokens in a document for tokens
        for question in QUESTIONS:
            for name, value in reference(model, tokenizer, question, text, chat).items():
                assert close(found[name][number], value), (style, name)


def test_a_question_among_others_gets_the_answers_that_it_gets_alone(judge, corpus, tmp_path):
    """Also of a document that spells out special tokens."""
    style, path, _, _ = judge
    if style != "qwen":
        pytest.skip("one style is enough: the others are compared with transformers")
    rubrics = {"alone": QUESTIONS[1:2], "together": QUESTIONS}
    tables = {
        name: scored(corpus, path, tmp_path / name, Rubric(questions, max_tokens=900))
        for name, questions in rubrics.items()
    }
    for column in QUESTIONS[1].columns():
        alone, together = (tables[name][column] for name in rubrics)
        assert np.allclose(alone, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_windows_are_judged_in_the_whole_prompt(judge, corpus, tmp_path, how):
    """Each window equals transformers' answer to its stretch of the text."""
    style, path, model, tokenizer = judge
    if style != {"mean": "gpt2", "min": "qwen"}[how]:
        pytest.skip("one style for each aggregate is enough")
    scorer = AskLLM(
        QUESTIONS[0].prompt, ("y",), ("n",), 40, windows=None, aggregate=how, keep_windows=True
    )
    found = scored(corpus, path, tmp_path / "windows", scorer)
    token = tokenizer("y", add_special_tokens=False)["input_ids"][0]
    several = 0
    for number, text in enumerate(texts_of(corpus)):
        if "<|" in text:
            continue
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in whole["offset_mapping"]]
        sizes = found["window_tokens"][number]
        assert sum(sizes) == len(ends) and found["truncated_tokens"][number] == 0
        cuts = [0, *(ends[i - 1] for i in np.cumsum(sizes)[:-1]), len(text)]
        values = found["ask_llm_yes_windows"][number]
        assert len(values) == len(sizes)
        several += len(sizes) > 2
        for begin, end, value in zip(cuts, cuts[1:], values, strict=False):
            prompt = QUESTIONS[0].prompt.replace("{document}", text[begin:end])
            ids = tokenizer(prompt)["input_ids"]
            assert len(ids) <= 40
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            assert close(value, torch.log_softmax(logits, -1)[token].item())
        mean = np.log(np.average(np.exp(values), weights=sizes))
        expected = min(values) if how == "min" else mean
        assert close(found["ask_llm_yes"][number], expected)
    assert several > 3


# --------------------------------------------------------------------------------------------------
# Encoder and decoder


def test_an_encoder_decoder_judge_answers_each_question(tiny_t5):
    """Answers of several tokens, and windows, against a plain T5 in NumPy."""
    questions = (
        Question("one", {"a": ("ab", "c"), "b": ("bcd",)}, "q {document} a", None, "{document}",
                 {"a": 1, "b": -1}),
        Question("two", {"1": ("1",), "2": ("2",)}, "{document}?"),
    )  # fmt: skip
    rubric = Rubric(questions, max_tokens=30, windows=2, aggregate="max")
    rng = np.random.default_rng(3)
    documents = Documents.of([rng.integers(3, 259, n).tolist() for n in (9, 0, 25, 26, 80)])
    prepared = rubric.prepare(tiny_t5.model, BYTES)
    windows = prepared.windows(documents)
    packed = packing.pack(windows.lengths, (64, 32))
    answers = np.asarray(jax.jit(prepared.step)(tiny_t5.params, packed.fill(windows)))
    found = prepared.finish(documents, windows, packed.gather(windows, answers)).columns
    room = 30 - 5  # "q ", " a" and EOS: the longest question's
    assert found["truncated_tokens"].tolist() == [0, 0, 0, 0, 30]
    for i, size in enumerate(documents.lengths.tolist()):
        if not size:
            assert np.isnan(found["one_a"][i])
            continue
        tokens = documents.tokens[documents.offsets[i] : documents.offsets[i + 1]].tolist()
        parts = [tokens[begin : begin + room] for begin in (0, room)]
        for question, before, after in zip(questions, ("q ", ""), (" a", "?"), strict=True):
            for answer, spellings in question.answers.items():
                values = []
                for part in filter(None, parts):
                    inputs = [*BYTES.encode(before), *part, *BYTES.encode(after), 1]
                    encoded = tiny_t5.plain.encode(inputs)
                    log_p = []
                    for spelling in spellings:
                        ids = BYTES.encode(spelling)
                        table = tiny_t5.plain.decode(encoded, [0, *ids[:-1]])
                        log_p.append(table[np.arange(len(ids)), ids].sum())
                    values.append(np.logaddexp.reduce(log_p))
                assert found[f"{question.name}_{answer}"][i] == pytest.approx(max(values), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Settings


def question(**changed) -> Question:
    given = {"name": "q", "answers": {"1": ("1",)}, "prompt": "{document}?"} | changed
    return Question(**given)


def test_a_published_prompt_is_read_from_its_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Rate {this}: <EXAMPLE>\nScore:")
    found = question(prompt="", file=str(file), slot="<EXAMPLE>")
    assert found == question(prompt="Rate {this}: {document}\nScore:")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answers": {}}, "has no answers"),
        ({"answers": {"none": ("x",)}, "weights": {"none": 1}}, "cannot be called 'none'"),
        ({"answers": {"good": ("x",)}}, "no numbers"),
        ({"weights": {"2": 1}}, "weights are of 2"),
        ({"name": "a b"}, "letters, digits"),
        ({"prompt": ""}, "either a prompt or a file"),
        ({"prompt": "", "file": "nowhere.txt"}, "cannot be read"),
        ({"prompt": "no slot"}, "0 times"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(changed, said):
    with pytest.raises(ScoreError, match=said):
        question(**changed)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"1": ("1",), "10": ("10",)}, "could count for both"),
        ({"1": ("1", "x"), "2": ("x",)}, "could count for both"),
        ({"1": ()}, "is empty"),
        ({"1": ("",)}, "no tokens"),
    ],
)
def test_answers_that_cannot_be_told_apart_are_refused(tiny_t5, answers, said):
    with pytest.raises(ScoreError, match=said):
        Rubric((question(answers=answers),)).prepare(tiny_t5.model, BYTES)


def test_more_tokens_than_the_model_has_positions_are_refused():
    from models.config import DecoderConfig
    from models.model import Model

    shape = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    model = Model(DecoderConfig(**shape, head_dim=16, vocab_size=400, positions="learned",
                                max_length=64))  # fmt: skip
    Rubric((question(answers={"1": ("abc",)}),), max_tokens=62).prepare(model, BYTES)
    with pytest.raises(ScoreError, match="makes 65, and the model has 64 positions"):
        Rubric((question(answers={"1": ("abc",)}),), max_tokens=63).prepare(model, BYTES)


def test_rubrics_are_checked():
    with pytest.raises(ScoreError, match="questions is empty"):
        Rubric(())
    with pytest.raises(ScoreError, match="two questions have the column 'q_1'"):
        Rubric((question(), question()))
    with pytest.raises(ScoreError, match="windows is at least 1"):
        Rubric((question(),), windows=0)
