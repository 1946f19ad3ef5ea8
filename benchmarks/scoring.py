"""Winnow's scoring beside its peers: same weights, same C4 documents, same cores, one run.

    python benchmarks/scoring.py --size=small --documents=128

Ask-LLM and the log-likelihood of documents of at most 512 tokens, by
  winnow               the whole engine: corpus on disk to score set on disk, compilation apart
  transformers padded  batches of 8, every document padded to 512
  transformers sorted  documents sorted by length, batches of about 8 x 512 tokens
  CTranslate2          sorted likewise; float32 and int8
The weights are random, of a published shape, written as a Hugging Face directory that all read.
Needs torch, transformers and ctranslate2. Peers are given token ids: tokenizing is not counted on
any side. Every arm has its warm-up; then they take turns for `--rounds` rounds, so that a busy
machine disturbs all alike; reported is the best round. "docs/CPU-s" counts the CPU time of all
threads: to be looked at on a busy machine, and with one core for each program (`taskset -c 0`). The
share of peak is of the FLOPs that the documents need, unpadded, over what matrix products of 2,048
reach in JAX here in the same dtype (CTranslate2's int8: of float32's).
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from models.model import Model
from models.published import NAMED
from models.weights import huggingface
from pruning.corpus import ingest
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores.model import device, engine, estimate
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.batches import Reader
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.scorer import Documents
from pruning.scores.score_set import schema_of
from pruning.store.build import Build
from pruning.store.parallel import available_cpus

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("WINNOW_DATA", REPOSITORY.parent / "shared" / "data"))
VOCABULARY = DATA / "tokenizer" / "t5-base.spiece.model"
CAP = 512
BATCH = 8
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = {
    "ask_llm": AskLLM(max_tokens=CAP),
    # A T5 decoder over the document, in one window, with nothing but EOS in the encoder.
    "likelihood": Likelihood("causal", window=CAP, max_tokens=CAP),
}
Batches = list[tuple[np.ndarray, int]]  # which documents, and the length that they are padded to
Run = Callable[[int | None], np.ndarray]  # of the first so many documents, or of all -> values


@dataclasses.dataclass
class Arm:
    """One contestant."""

    task: str
    name: str
    dtype: str
    run: Run
    wall: float = float("inf")
    cpu: float = float("inf")
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def measure(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.values = self.run(None)
        self.wall = min(self.wall, time.perf_counter() - wall)
        self.cpu = min(self.cpu, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="of Flan-T5: small, base, ...")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--batch_rows", type=int, default=4)
    parser.add_argument("--unrolled", action="store_true", help="Score.scan_layers=False")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--arms", default="winnow,padded,sorted,ctranslate2")
    options = parser.parse_args()
    torch.set_num_threads(available_cpus())
    device.use_cores(options.batch_rows)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        corpus = make_corpus(place, options.documents)
        save_model(place / "model", NAMED[f"flan_t5_{options.size}"])
        arms, flops = [], {}
        for task in options.tasks.split(","):
            flops[task] = flops_of(task, corpus, options)
            arms += contestants(place, corpus, task, options)
        for arm in arms:
            arm.run(BATCH)
        for _ in range(options.rounds):
            for arm in arms:
                arm.measure()
        report(arms, flops, options, corpus)


def contestants(place: Path, corpus: Corpus, task: str, options) -> Iterator[Arm]:
    wanted = options.arms.split(",")
    dtypes = options.dtypes.split(",")
    for dtype in dtypes:
        if "winnow" in wanted:
            yield Arm(task, "winnow", dtype, winnow(place, corpus, task, dtype, options))
        for name, batches in (("padded", padded), ("sorted", by_length)):
            if name in wanted:
                run = with_transformers(place, corpus, task, dtype, batches)
                yield Arm(task, f"transformers {name}", dtype, run)
    if "ctranslate2" in wanted and "float32" in dtypes:
        for dtype in ("float32", "int8"):
            yield Arm(task, "ctranslate2", dtype, with_ctranslate2(place, corpus, task, dtype))


# --------------------------------------------------------------------------------------------------
# What is scored, and with what


def make_corpus(place: Path, count: int) -> Corpus:
    source = DATA / "corpus" / "c4" / "c4_real_merged.jsonl.gz"
    with gzip.open(source, "rt") as file, (place / "c4.jsonl").open("w") as out:
        lines = file.readlines()
        for index in np.random.default_rng(0).permutation(len(lines))[:count]:
            out.write(lines[index])
    ingest.run(
        ingest.IngestConfig(
            source=JsonlSource((str(place / "c4.jsonl"),)),
            vocabulary=str(VOCABULARY),
            output=str(place / "corpus"),
            workers=1,
        )
    )
    return load_corpus(place / "corpus")


def save_model(path: Path, shape) -> None:
    model = Model(shape)
    huggingface.save(path, model, jax.jit(model.init)(jax.random.key(0)))
    shutil.copy(VOCABULARY, path / "spiece.model")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100})
    )


def inputs_of(corpus: Corpus, task: str) -> Documents:
    """What the model reads of every document: with the prompt around it, or cut."""
    tokens = corpus.tokens_of(0, np.arange(corpus.documents(0)))
    documents = Documents.of([list(map(int, t)) for t in tokens])
    if task == "ask_llm":
        prompt = TASKS["ask_llm"].prompt_ids(corpus.vocabulary, NAMED["flan_t5_small"])
        return prompt.around(documents, CAP)[0]
    return documents.cut(CAP)[0]


def flops_of(task: str, corpus: Corpus, options) -> float:
    """What the documents need, each by itself."""
    config = NAMED[f"flan_t5_{options.size}"]
    prepared = TASKS[task].prepare(Model(config), corpus.vocabulary)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    return estimate.Costs(config, prepared.sides).of(windows)


def winnow(place: Path, corpus: Corpus, task: str, dtype: str, options) -> Run:
    """The engine, compiled."""
    loaded = device.load(str(place / "model"), dtype, scan_layers=not options.unrolled)
    prepared = TASKS[task].prepare(loaded.model, corpus.vocabulary)
    costs = estimate.Costs(loaded.model.config, prepared.sides)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    row_lengths = estimate.choose_row_lengths(prepared, costs, windows, options.row_length)
    reader = Reader(corpus, None, prepared, row_lengths, options.batch_rows)
    step = device.Step(prepared, loaded, reader.batch_shapes)
    print(f"winnow {task} {dtype}: rows of {row_lengths}, compiled in {step.compile_seconds:.0f} s")

    def run(count: int | None) -> np.ndarray:
        if count is not None:
            return np.asarray(step(reader.empty_rows()))
        output = tempfile.mkdtemp(dir=place)
        schema = schema_of(prepared.columns)
        build = Build(output, "scores", {}, {"corpus": corpus.artifact}, corpus.num_shards, schema)
        engine.score(reader, build.pending(), step, build)
        column = "ask_llm_yes" if task == "ask_llm" else "nll"
        return build.finish().read(0)[column].to_numpy()

    return run


def padded(lengths: np.ndarray) -> Batches:
    parts = np.split(np.arange(len(lengths)), range(BATCH, len(lengths), BATCH))
    return [(part, CAP) for part in parts]


def by_length(lengths: np.ndarray) -> Batches:
    batches, batch = [], []
    for index in np.argsort(-lengths, kind="stable"):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH * CAP:
            batches.append((np.array(batch), int(lengths[batch[0]])))
            batch = []
        batch.append(index)
    return [*batches, (np.array(batch), int(lengths[batch[0]]))]


def with_transformers(place: Path, corpus, task: str, dtype: str, batches) -> Run:
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        place / "model", dtype=TORCH[dtype]
    ).eval()
    documents = inputs_of(corpus, task)
    yes = corpus.vocabulary.token("yes")

    def rectangle(which: np.ndarray, length: int) -> torch.Tensor:
        ids = np.zeros((len(which), length), np.int64)
        for row, index in enumerate(which):
            tokens = documents.tokens[documents.offsets[index] : documents.offsets[index + 1]]
            ids[row, : len(tokens)] = tokens
        return torch.from_numpy(ids)

    def ask_llm(ids: torch.Tensor) -> torch.Tensor:
        start = torch.zeros((len(ids), 1), dtype=torch.long)
        logits = model(
            input_ids=ids, attention_mask=(ids > 0).long(), decoder_input_ids=start
        ).logits
        return torch.log_softmax(logits[:, 0].float(), dim=-1)[:, yes]

    def likelihood(ids: torch.Tensor) -> torch.Tensor:
        inputs = torch.zeros_like(ids)
        inputs[:, 1:] = ids[:, :-1]
        eos = torch.ones((len(ids), 1), dtype=torch.long)
        logits = model(input_ids=eos, decoder_input_ids=inputs).logits
        chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None])[..., 0]
        return -(chosen * (ids > 0)).sum(-1)

    score = ask_llm if task == "ask_llm" else likelihood

    @torch.inference_mode()
    def run(count: int | None) -> np.ndarray:
        lengths = documents.lengths[:count]
        values = np.empty(len(lengths), np.float32)
        for which, length in batches(lengths):
            values[which] = score(rectangle(which, length)).numpy()
        return values

    return run


def with_ctranslate2(place: Path, corpus, task: str, dtype: str) -> Run:
    import ctranslate2

    converted = place / f"ctranslate2_{dtype}"
    if not converted.exists():
        converter = ctranslate2.converters.TransformersConverter(str(place / "model"))
        converter.convert(str(converted), quantization=dtype)
    translator = ctranslate2.Translator(
        str(converted), compute_type=dtype, inter_threads=1, intra_threads=available_cpus()
    )
    pieces = json.loads((converted / "shared_vocabulary.json").read_text())
    documents = inputs_of(corpus, task)
    bounds = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    texts = [[pieces[t] for t in documents.tokens[begin:end]] for begin, end in bounds]
    if task == "ask_llm":
        answer = [pieces[corpus.vocabulary.token("yes")]]
        pairs = [(text, answer) for text in texts]
    else:
        pairs = [(["</s>"], text) for text in texts]

    def run(count: int | None) -> np.ndarray:
        some = pairs[:count]
        found = translator.score_batch(
            [source for source, _ in some],
            [target for _, target in some],
            max_batch_size=BATCH * CAP,
            batch_type="tokens",
        )
        # The last token scored is EOS after the target, which the others do not ask for.
        sums = np.array([sum(scores.log_probs[:-1]) for scores in found])
        return sums if task == "ask_llm" else -sums

    return run


# --------------------------------------------------------------------------------------------------
# What came out


def peak(dtype: str, size: int = 2048) -> float:
    """FLOP/s of the best of ten matrix products."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def report(arms: list[Arm], flops: dict[str, float], options, corpus: Corpus) -> None:
    count = corpus.documents(0)
    peaks = {dtype: peak(dtype) for dtype in options.dtypes.split(",")}
    manifest = corpus.artifact.manifest
    print(
        f"\nFlan-T5-{options.size} shape, {count} C4 documents (mean {manifest.tokens / count:.0f} "
        f"tokens), {available_cpus()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, jax {jax.__version__}"
    )
    told = ", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in peaks.items())
    print(f"measured peak of matrix products: {told}")
    print(f"{'':38} docs/s  docs/CPU-s  of peak   winnow is: clock, CPU   largest difference")
    rows: list[dict[str, Any]] = []
    for arm in arms:
        of_task = [other for other in arms if other.task == arm.task]
        dtype = "float32" if arm.dtype == "int8" else arm.dtype
        ours = [a for a in of_task if (a.name, a.dtype) == ("winnow", dtype)]
        exact = next((a for a in of_task if "padded" in a.name), of_task[0]).values
        difference = np.max(np.abs(arm.values - exact) / np.maximum(1, np.abs(exact)))
        share = flops[arm.task] / arm.wall / peaks.get(dtype, np.inf)
        faster = f"{arm.wall / ours[0].wall:7.2f}x {arm.cpu / ours[0].cpu:6.2f}x" if ours else ""
        print(
            f"{arm.task:10} {arm.name:19} {arm.dtype:8} {count / arm.wall:7.2f} "
            f"{count / arm.cpu:9.2f} {100 * share:9.1f}% {faster:15} {difference:14.1e}"
        )
        names = ("task", "name", "dtype", "wall", "cpu")
        rows.append({name: getattr(arm, name) for name in names} | {"share_of_peak": share})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
