"""Examples of data sets as text in, text out, as T5 does it (arXiv 1910.10683, appendix D).

    {"sentence": "John made Bill master of himself.", "label": 1}
      -> {"inputs": "cola sentence: John made Bill master of himself.", "targets": "acceptable"}

Choices
- Plain functions of dictionaries, named as TFDS names their fields: no TensorFlow, one example in,
  a list of examples out (one per answer in ReCoRD's training; none where nothing can be learned).
- An example without a label (test sets: label -1) has the target "<unk>", as in T5.
- Beside inputs and targets stands what its metric needs: `label`, `group`, `answers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.errors import EvaluationError

Example = dict[str, Any]
Preprocess = Callable[[Mapping[str, Any]], list[Example]]

UNKNOWN = "<unk>"


def fields(prefix: str, names: Sequence[str], labels: Sequence[str]) -> Preprocess:
    """Return a preprocessor for `prefix name: value name: value` and the label's word.

    Args:
      names: the fields in their order.
      labels: word of each label.
    """

    def preprocess(example: Mapping[str, Any]) -> list[Example]:
        given = " ".join(f"{name}: {example[name]}" for name in names)
        label = int(example["label"])
        target = UNKNOWN if label < 0 else labels[label]
        return [{"inputs": f"{prefix} {given}", "targets": target, "label": label}]

    return preprocess


def stsb(example: Mapping[str, Any]) -> list[Example]:
    """Convert a similarity from 0 to 5 to one of 26 words, rounded to the nearest fifth."""
    given = f"stsb sentence1: {example['sentence1']} sentence2: {example['sentence2']}"
    label = float(example["label"])
    target = UNKNOWN if label < 0 else f"{round(label * 5) / 5:.1f}"
    return [{"inputs": given, "targets": target, "label": label}]


def multirc(example: Mapping[str, Any]) -> list[Example]:
    """Convert MultiRC to one example per answer; the answers to one question are a group."""
    names = ("question", "answer", "paragraph")
    [made] = fields("multirc", names, ("False", "True"))(example)
    made["inputs"] = re.sub("</?b>", "", made["inputs"].replace("<br>", " "))
    index = example["idx"]
    return [made | {"group": f"{index['paragraph']}-{index['question']}"}]


def record(example: Mapping[str, Any]) -> list[Example]:
    """Convert ReCoRD to one example per right answer, the entity at @placeholder."""
    passage = re.sub(r"""([.?!"'])\n@highlight\n""", r"\1 ", example["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    entities = ", ".join(example["entities"])
    given = f"record query: {example['query']} entities: {entities} passage: {passage}"
    answers = list(example["answers"])
    group = f"{example['idx']['passage']}-{example['idx']['query']}"
    return [
        {"inputs": given, "targets": answer, "answers": answers, "group": group}
        for answer in answers or [UNKNOWN]
    ]


# Two texts of WSC whose marked word is not the pronoun; T5 mends them by hand, and so do we: the
# beginning of the text -> (the words around the pronoun).
_MENDED = {
    "The boy continued to whip the pony": ('"Good for him,"', '"Good for {} ,"'),
    "When they had eventually calmed down a bit": ("want to use it ,", "want to use {} ,"),
}


def wsc(training: bool) -> Preprocess:
    """Convert WSC to `wsc: ... *pronoun* ...` and its referent.

    The target is the noun phrase that the example asks about, right or wrong: so training takes
    only the examples in which it is right, and evaluation compares what the model says with it.
    """

    def preprocess(example: Mapping[str, Any]) -> list[Example]:
        label = int(example.get("label", -1))
        if training and label != 1:
            return []
        text, pronoun = example["text"], example["span2_text"]
        return [
            {
                "inputs": f"wsc: {_marked(text, pronoun, int(example['span2_index']))}",
                "targets": example["span1_text"],
                "label": label,
            }
        ]

    return preprocess


def _marked(text: str, pronoun: str, index: int) -> str:
    for beginning, (said, mended) in _MENDED.items():
        if text.startswith(beginning) and said in text:
            word = "it" if " it " in said else "him"
            return text.strip().replace(said, mended.format(f"*{word}*"))
    words = text.split(" ")
    if not 0 < index < len(words) or words[index] != pronoun:
        raise EvaluationError(
            f"WSC: word {index} of {text!r} is not {pronoun!r}: the index counts words that are "
            "parted by single spaces."
        )
    return " ".join([*words[:index], f"*{pronoun}*", *words[index + 1 :]])


def definite_pronoun(example: Mapping[str, Any]) -> list[Example]:
    """Convert Definite Pronoun Resolution to the form of WSC; the first such pronoun is meant."""
    pronoun = re.escape(example["pronoun"])
    marked = re.sub(rf" ({pronoun})( |\.|,)", r" *\1*\2", example["sentence"], count=1)
    return [{"inputs": f"wsc: {marked}", "targets": example["candidates"][int(example["label"])]}]


_PRONOUNS = {"he", "she", "they", "it", "her", "his", "their", "them", "him"}
_ENDS = ".,?!"
_LONGEST_REFERENT = 8  # words


def wnli(example: Mapping[str, Any]) -> list[Example]:
    """Convert WNLI to the form of WSC, for evaluation: which pronoun of the first does the second
    sentence replace, and by what?

    Of the pronouns, the one whose neighbors are found again in the second sentence, all of its
    words if possible; what stands between them there is the referent.
    """
    words, said = example["sentence1"].split(" "), example["sentence2"].split(" ")
    plain, heard = _plain(words), _plain(said)
    found = []  # (is all explained, words in common, those behind), pronoun, the referent's bounds
    for index in (i for i, word in enumerate(plain) if word in _PRONOUNS):
        for start in range(len(heard)):
            left = _common(plain[:index][::-1], heard[:start][::-1])
            for stop in range(start + 1, min(start + _LONGEST_REFERENT, len(heard)) + 1):
                right = _common(plain[index + 1 :], heard[stop:])
                whole = (left, right) == (start, len(heard) - stop)
                if left + right:
                    found.append(((whole, left + right, right), -index, start, stop))
    if not found:
        raise EvaluationError(f"WNLI: no pronoun of {words} is replaced in {said}.")
    _, index, start, stop = max(found)
    referent = re.sub("'s?$", "", " ".join(said[start:stop]).rstrip(_ENDS))
    pronoun = words[-index].rstrip(_ENDS)
    tail = words[-index].removeprefix(pronoun)
    words[-index] = f"*{pronoun}*" + (f" {tail}" if tail else "")
    label = int(example.get("label", -1))
    return [{"inputs": f"wsc: {' '.join(words)}", "targets": referent, "label": label}]


def _plain(words: Sequence[str]) -> list[str]:
    return [word.lower().rstrip(_ENDS) for word in words]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the number of words that two texts share at their beginning."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def squad(example: Mapping[str, Any]) -> list[Example]:
    """Convert SQuAD to `question: ... context: ...` and the first answer."""
    answers = [spaced(answer) for answer in example["answers"]["text"]]
    given = f"question: {spaced(example['question'])} context: {spaced(example['context'])}"
    return [
        {
            "inputs": re.sub(r"\s+", " ", given),
            "targets": answers[0] if answers else UNKNOWN,
            "answers": answers,
            "id": example["id"],
        }
    ]


def spaced(text: str) -> str:
    """Return text with spaces around ASCII punctuation and white space collapsed."""
    text = re.sub(r"([!-/:-@\[-`{-~])", r" \1 ", text)
    return re.sub(r"[ \t\n\r\f\v]+", " ", text)


def summarize(example: Mapping[str, Any]) -> list[Example]:
    return [{"inputs": f"summarize: {example['article']}", "targets": example["highlights"]}]
