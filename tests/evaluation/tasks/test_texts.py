"""Text formats: the examples of T5's paper (appendix D) and of its test data."""

import json

import pytest

from evaluation.tasks import suite, texts
from evaluation.tasks.suite import TASKS


def made(name, **example):
    return TASKS[name].preprocess(example)


@pytest.mark.parametrize(
    ("name", "example", "inputs", "target"),
    [
        (
            "glue_cola_v002",
            {"sentence": "John made Bill master of himself.", "label": 1},
            "cola sentence: John made Bill master of himself.",
            "acceptable",
        ),
        (
            "glue_sst2_v002",
            {"sentence": "it confirms fincher ’s status", "label": 1},
            "sst2 sentence: it confirms fincher ’s status",
            "positive",
        ),
        (
            "glue_rte_v002",
            {"sentence1": "A smaller proportion.", "sentence2": "Roughly half.", "label": 1},
            "rte sentence1: A smaller proportion. sentence2: Roughly half.",
            "not_entailment",
        ),
        (
            "glue_mnli_v002",
            {"premise": "yeah but not all.", "hypothesis": "The St. Louis Cardinals.", "label": 2},
            "mnli hypothesis: The St. Louis Cardinals. premise: yeah but not all.",
            "contradiction",
        ),
        (
            "glue_ax_v002",
            {"premise": "A.", "hypothesis": "B.", "label": -1},
            "mnli hypothesis: B. premise: A.",
            "<unk>",
        ),
        (
            "glue_qqp_v002",
            {"question1": "What?", "question2": "Why?", "label": 0},
            "qqp question1: What? question2: Why?",
            "not_duplicate",
        ),
        (
            "super_glue_copa_v102",
            {
                "premise": "Political violence broke out in the nation.",
                "choice1": "Many citizens relocated to the capitol.",
                "choice2": "Many citizens took refuge in other territories.",
                "question": "effect",
                "label": 1,
            },
            "copa choice1: Many citizens relocated to the capitol. choice2: Many citizens took "
            "refuge in other territories. premise: Political violence broke out in the nation. "
            "question: effect",
            "choice2",
        ),
        (
            "super_glue_cb_v102",
            {"premise": "B: and, tear everything up.", "hypothesis": "they tear", "label": 0},
            "cb hypothesis: they tear premise: B: and, tear everything up.",
            "entailment",
        ),
        (
            "super_glue_boolq_v102",
            {"question": "is it", "passage": "It is -- not.", "label": 0},
            "boolq passage: It is -- not. question: is it",
            "False",
        ),
        (
            "super_glue_wic_v102",
            {"word": "class", "sentence1": "One.", "sentence2": "Two.", "label": 1},
            "wic sentence1: One. sentence2: Two. word: class",
            "True",
        ),
        (
            "super_glue_axb_v102",
            {"sentence1": "P.", "sentence2": "H.", "label": -1},
            "rte hypothesis: H. premise: P.",
            "<unk>",
        ),
        (
            "glue_stsb_v002",
            {"sentence1": "Big news.", "sentence2": "No idea.", "label": 2.8},
            "stsb sentence1: Big news. sentence2: No idea.",
            "2.8",
        ),
        (
            "cnn_dailymail_v002",
            {"article": "An article.", "highlights": "A summary."},
            "summarize: An article.",
            "A summary.",
        ),
        (
            "super_glue_multirc_v102",
            {
                "paragraph": "<b>Sent 1: </b>There was a squirrel.<br><b>Sent 2: </b>He left.",
                "question": "Why?",
                "answer": "There was only pie to eat",
                "label": 1,
                "idx": {"paragraph": 5, "question": 1, "answer": 3},
            },
            "multirc question: Why? answer: There was only pie to eat paragraph: Sent 1: There was "
            "a squirrel. Sent 2: He left.",
            "True",
        ),
    ],
)
def test_fields_as_published(name, example, inputs, target):
    [one] = made(name, **example)
    assert (one["inputs"], one["targets"]) == (inputs, target)


@pytest.mark.parametrize(
    ("label", "word"), [(1.66, "1.6"), (0.0, "0.0"), (4.93, "5.0"), (3.25, "3.2"), (5.0, "5.0")]
)
def test_similarities_are_rounded_to_fifths(label, word):
    [one] = made("glue_stsb_v002", sentence1="a", sentence2="b", label=label)
    assert one["targets"] == word and one["targets"] in TASKS["glue_stsb_v002"].words


def test_record_has_an_example_per_answer():
    passage = "This is the passage\n@highlight\nAnother sentence.\n@highlight\nThird sentence."
    example = {
        "query": "It was @placeholder.",
        "entities": ["A", "B", "C"],
        "passage": passage,
        "answers": ["A", "C"],
        "idx": {"passage": 1, "query": 2},
    }
    found = texts.record(example)
    assert [one["targets"] for one in found] == ["A", "C"]
    assert {one["inputs"] for one in found} == {
        "record query: It was @placeholder. entities: A, B, C passage: This is the passage. "
        "Another sentence. Third sentence."
    }
    assert len({one["group"] for one in found}) == 1
    [hidden] = texts.record(example | {"answers": []})
    assert hidden["targets"] == "<unk>"


def test_the_pronoun_is_marked_and_training_takes_right_referents_only():
    example = {
        "text": "Mitchell asked Tom if he could lend some money.",
        "span1_text": "Tom",
        "span2_text": "he",
        "span2_index": 4,
        "label": 1,
    }
    marked = "wsc: Mitchell asked Tom if *he* could lend some money."
    for task in ("super_glue_wsc_v102_simple_train", "super_glue_wsc_v102_simple_eval"):
        [one] = made(task, **example)
        assert (one["inputs"], one["targets"]) == (marked, "Tom")
    wrong = example | {"span1_text": "Mitchell", "label": 0}
    assert made("super_glue_wsc_v102_simple_train", **wrong) == []
    assert made("super_glue_wsc_v102_simple_eval", **wrong)[0]["targets"] == "Mitchell"
    with pytest.raises(ValueError, match="word 3 of"):
        made("super_glue_wsc_v102_simple_eval", **(example | {"span2_index": 3}))


@pytest.mark.parametrize(
    ("sentence", "pronoun", "marked"),
    [
        ("Tom asked if he could, then he left.", "he", "Tom asked if *he* could, then he left."),
        ("A book was unreadable to him.", "him", "A book was unreadable to *him*."),
        ("He lost because that newbie won.", "that newbie", "He lost because *that newbie* won."),
    ],
)
def test_definite_pronouns(sentence, pronoun, marked):
    example = {"sentence": sentence, "pronoun": pronoun, "candidates": ["A", "B"], "label": 1}
    [one] = texts.definite_pronoun(example)
    assert one == {"inputs": f"wsc: {marked}", "targets": "B"}


@pytest.mark.parametrize(
    ("premise", "hypothesis", "marked", "referent"),
    [
        (
            "Lily spoke to Donna breaking her silence.",
            "Lily spoke to Donna breaking Donna's silence.",
            "Lily spoke to Donna breaking *her* silence.",
            "Donna",
        ),
        (
            "The fish ate the worm. It was tasty.",
            "The worm was tasty.",
            "The fish ate the worm. *It* was tasty.",
            "The worm",
        ),
        (
            "Edward dropped adhesive tape onto his window sill, and when he pulled the tape off, "
            "some of the glue was stuck on it.",
            "Some of the glue was stuck on the window sill.",
            "Edward dropped adhesive tape onto his window sill, and when he pulled the tape off, "
            "some of the glue was stuck on *it* .",
            "the window sill",
        ),
        (
            "Al stole Bob's wallet and car, and then he was driving it really fast to get away.",
            "He was driving the car really fast to get away.",
            "Al stole Bob's wallet and car, and then he was driving *it* really fast to get away.",
            "the car",
        ),
    ],
)
def test_wnli_in_the_form_of_wsc(premise, hypothesis, marked, referent):
    [one] = texts.wnli({"sentence1": premise, "sentence2": hypothesis, "label": 1})
    assert (one["inputs"], one["targets"]) == (f"wsc: {marked}", referent)


def test_squad_puts_spaces_around_punctuation():
    [one] = texts.squad(
        {
            "id": "testid",
            "context": "Some context.",
            "question": "A question?",
            "answers": {"text": ["The answer.", "Another answer."]},
        }
    )
    assert one["inputs"] == "question: A question ? context: Some context . "
    assert one["targets"] == "The answer . " and one["answers"][1] == "Another answer . "
    text = '"This  is a string with "punctuation (1845-1986) ".'
    assert texts.spaced(text) == ' " This is a string with " punctuation ( 1845 - 1986 ) " . '
    assert texts.spaced("François's") == "François ' s"


# Rows of every published file that is there, and how many examples they make.
COUNTS = {
    ("glue_cola_v002", "train"): 8_551,
    ("glue_cola_v002", "validation"): 1_043,
    ("glue_sst2_v002", "train"): 67_349,
    ("glue_sst2_v002", "validation"): 872,
    ("glue_mrpc_v002", "train"): 3_668,
    ("glue_mrpc_v002", "validation"): 408,
    ("glue_qnli_v002", "validation"): 5_463,
    ("glue_rte_v002", "train"): 2_490,
    ("glue_rte_v002", "validation"): 277,
    ("super_glue_boolq_v102", "validation"): 3_270,
    ("super_glue_cb_v102", "validation"): 56,
    ("super_glue_copa_v102", "validation"): 100,
    ("super_glue_multirc_v102", "validation"): 4_848,
    ("super_glue_rte_v102", "validation"): 277,
    ("super_glue_wic_v102", "validation"): 638,
    ("super_glue_wsc_v102_simple_eval", "validation"): 104,
}


def test_the_published_files_hold_what_was_published(real_data):
    data = str(real_data / "eval")
    for (name, split), count in COUNTS.items():
        examples = TASKS[name].examples(split, data)
        assert len(examples) == count, name
        words = TASKS[name].words
        assert words is None or {one["targets"] for one in examples} == set(words), name
        json.dumps(examples[0])  # travels as JSON


def test_small_training_sets_of_superglue(real_data):
    data = str(real_data / "eval")
    right = TASKS["super_glue_wsc_v102_simple_train"].examples("train", data)
    assert right and all(one["label"] == 1 for one in right)
    record = TASKS["super_glue_record_v102"].examples("train", data)
    assert all(one["targets"] in one["answers"] for one in record)
    assert all(
        "@placeholder" in one["inputs"] and "@highlight" not in one["inputs"] for one in record
    )


def test_a_mixture_is_its_tasks():
    training = suite.tasks_of("glue_v002_proportional", training=True)
    assert "glue_mnli_v002" in training and "glue_mnli_matched_v002" not in training
    judged = suite.tasks_of("glue_v002_proportional super_glue_v102_proportional")
    assert "glue_mnli_matched_v002" in judged and "glue_ax_v002" not in judged
    assert "super_glue_wsc_v102_simple_eval" in judged
    assert "super_glue_wsc_v102_simple_train" not in judged
    both = suite.MIXTURES["glue_and_super_glue_proportional"]
    assert len(both) == sum(
        len(suite.MIXTURES[f"{name}_proportional"]) for name in ("glue_v002", "super_glue_v102")
    )
    with pytest.raises(suite.TaskError, match="no task or mixture 'glue_cola'"):
        suite.tasks_of("glue_cola")


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("glue/SST-2/dev.tsv", "sentence\tlabel\nfine\t1\nbad\t7\n", r"dev\.tsv, line 3: .*'7'"),
        ("glue/SST-2/dev.tsv", "sentence\tlabel\nfine\n", r"dev\.tsv, line 2: not a row"),
        ("glue/RTE/dev.tsv", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n", "'maybe' is none of"),
        ("superglue/CB/val.jsonl", '{"premise": "a"}\n', r"val\.jsonl, line 1: not a row"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, file, text, says):
    from evaluation.tasks.sources import SourceError

    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    name = {"SST-2": "glue_sst2_v002", "RTE": "glue_rte_v002", "CB": "super_glue_cb_v102"}
    task = TASKS[name[path.parent.name]]
    with pytest.raises(SourceError, match=says):
        task.examples("validation", str(tmp_path))
    with pytest.raises(SourceError, match="no split 'train'"):
        task.examples("train", str(tmp_path))
