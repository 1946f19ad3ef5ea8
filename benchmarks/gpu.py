"""Winnow beside transformers on one GPU, in one call: kernels, scoring, training, decoder-only.

    python benchmarks/gpu.py --minutes 9 --output gpu.md
    python benchmarks/gpu.py --tiny                       # the same on a CPU, with tiny shapes

Each measurement is appended to the table as soon as it is made, so that a run that is cut off keeps
what it has; what no time is left for is listed as such. In this order:
  parity       the attention kernel compiled for this GPU beside the plain form (gpu_parity.py)
  gated MLP    its kernel beside XLA's two products
  Ask-LLM      documents of a corpus on disk to scores on disk, Flan-T5-large and -XL shape
  likelihood   the same for a T5 decoder over the document
  training     steps of T5 v1.1 large, 512 + 114 tokens, Adafactor
  decoder      the likelihood by GPT-2 large's shape
The peer is transformers in bfloat16: attention by SDPA where the model has it, documents sorted by
length in batches of equal tokens, torch.compile on a GPU. Weights are random, drawn by each program
for itself; documents are random words with lengths as in C4 (log-normal, mean 480 tokens), or those
of `--corpus`, an ingested corpus with a T5 vocabulary. The share of peak is of the FLOPs that the
documents need by themselves, unpadded, by the plain model, over the data sheet's bf16 peak.

Needs the extra `gpu`; the peer `hf` and PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_parity
import jax
import jax.numpy as jnp
import numpy as np

import train
from models import flops, partitioning
from models.config import DecoderConfig, ModelConfig, T5Config
from models.kernels import gated
from models.layers import ACTIVATIONS
from models.model import Model
from models.published import NAMED
from pruning.corpus import ingest, vocabulary_training
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores.model import device, engine, estimate
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.batches import Reader
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.score_set import schema_of
from pruning.store.build import Build

CAP = 512
TINY = {
    "t5": T5Config(
        vocab_size=512, d_model=32, d_kv=16, num_heads=2, d_ff=64,
        num_encoder_layers=1, num_decoder_layers=1,
    ),
    "decoder": DecoderConfig(
        vocab_size=512, d_model=32, d_ff=64, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=16,
    ),
}  # fmt: skip


@dataclasses.dataclass
class Run:
    """Settings of a run, and its time limit.

    Attributes:
      ends: when no measurement begins any more, by time.monotonic.
      peak: the chip's bf16 FLOP/s; None where it is unknown.
    """

    options: argparse.Namespace
    place: Path
    ends: float
    peak: float | None

    @property
    def tiny(self) -> bool:
        return self.options.tiny

    def left(self) -> float:
        return self.ends - time.monotonic()

    def tell(self, what: str, program: str, value: str, share: float | None = None) -> None:
        """Append a row to the table."""
        part = "" if share is None else f"{share:.1%}"
        with self.options.output.open("a") as file:
            print(f"| {what} | {program} | {value} | {part} |", file=file)
        print(f"{what:32} {program:24} {value:28} {part}", flush=True)

    def attempt(self, what: str, program: str, least: float, measure: Callable[[], None]) -> None:
        """Measure if `least` seconds are left. A failure is a row of the table, and not the end."""
        least = 0 if self.tiny else least
        if self.left() < least or self.left() <= 0:
            left = max(0, self.left())
            self.tell(what, program, f"not run: {left:.0f} s left, needs {least:.0f}")
            return
        try:
            measure()
        except Exception as error:  # memory of the GPU, a missing package, a compiler's refusal
            first = str(error).strip().splitlines()[:1] or [""]
            self.tell(what, program, f"failed: {type(error).__name__}: {first[0][:120]}")
            if self.tiny:
                raise

    def share(self, work: float, seconds: float) -> float | None:
        return None if self.peak is None else work / seconds / self.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--corpus", help="an ingested corpus; without one, random documents")
    parser.add_argument("--documents", type=int, default=2048)
    parser.add_argument("--only", default="", help="measure what has this in its first two columns")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a test on a CPU")
    options = parser.parse_args()
    if jax.default_backend() != "gpu" and not options.tiny:
        parser.error("JAX sees no GPU here: pip install 'winnow-lm[gpu]', or give --tiny")
    chip = jax.devices()[0]
    with tempfile.TemporaryDirectory() as directory:
        ends = time.monotonic() + 60 * options.minutes
        run = Run(options, Path(directory), ends, flops.peak_flops(chip))
        if not options.output.exists():
            options.output.write_text(
                f"{chip.device_kind}, jax {jax.__version__}\n\n"
                "| what | program | result | share of peak |\n|---|---|---|---|\n"
            )
        corpus = load_corpus(options.corpus) if options.corpus else make_corpus(run)
        for what, program, least, measure in measurements(run, corpus):
            if options.only in f"{what} {program}":
                run.attempt(what, program, least, measure)


def measurements(run: Run, corpus: Corpus) -> Iterator[tuple[str, str, float, Callable[[], None]]]:
    """Yield (what, program, seconds that it needs, measurement), the most important first."""
    peer = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")

    def scoring(
        what: str, config: ModelConfig, scorer: Any, rows: int, needs: float
    ) -> Iterator[tuple[str, str, float, Callable[[], None]]]:
        batch = 2 if run.tiny else rows
        yield what, "winnow", needs, lambda: score(run, what, corpus, config, scorer, batch)
        if peer:
            yield (
                what, "transformers", needs,
                lambda: score_by_transformers(run, what, corpus, config, scorer, batch),
            )  # fmt: skip

    def shape(name: str) -> ModelConfig:
        return TINY["decoder" if name.startswith("gpt2") else "t5"] if run.tiny else NAMED[name]

    ask, causal = AskLLM(max_tokens=CAP), Likelihood("causal", window=CAP, max_tokens=CAP)
    yield "parity of the kernel", "winnow", 20, lambda: parity(run)
    yield "gated MLP, Flan-T5-XL", "kernel beside XLA", 20, lambda: gated_mlp(run)
    yield from scoring("Ask-LLM, Flan-T5-large", shape("flan_t5_large"), ask, 32, 60)
    yield from scoring("Ask-LLM, Flan-T5-XL", shape("flan_t5_xl"), ask, 16, 90)
    training = "training, T5 v1.1 large", shape("t5_v1_1_large")
    yield training[0], "winnow", 90, lambda: train_steps(run, *training)
    if peer:
        yield training[0], "transformers", 60, lambda: train_by_transformers(run, *training)
    yield from scoring("likelihood, GPT-2 large", shape("gpt2_large"), causal, 16, 60)
    yield from scoring("likelihood, Flan-T5-large", shape("flan_t5_large"), causal, 16, 60)


# --------------------------------------------------------------------------------------------------
# Kernels, and the corpus


def parity(run: Run) -> None:
    on_gpu = jax.default_backend() == "gpu"
    lengths, dtypes = ([128], ["float32"]) if run.tiny else ([200, 1024], ["float32", "bfloat16"])
    chosen = gpu_parity.cases(lengths, dtypes)
    if not on_gpu:
        chosen = chosen[:1]
    good = sum(map(gpu_parity.passes, chosen))
    run.tell("parity of the kernel", "winnow", f"{good} of {len(chosen)} cases within bounds")


def gated_mlp(run: Run) -> None:
    """Compare the kernel of gated MLPs with XLA's two products: values, and times on a GPU."""
    on_gpu = jax.default_backend() == "gpu"
    blocks = gated.BLOCKS[gated.generation(jax.devices()[0].device_kind)]
    rows, depth, columns = (256, 128, 256) if run.tiny else (16_384, 2048, 5120)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, depth), (depth, columns), (depth, columns))
    given = [
        jax.random.normal(key, shape, jnp.bfloat16) * shape[0] ** -0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]
    act = ACTIVATIONS["gelu"]

    @jax.jit
    def kernel(x, first, second):
        return gated.gated_products(
            x, first, second, activation=act, blocks=blocks, interpret=not on_gpu
        )

    @jax.jit
    def plain(x, first, second):
        gate, value = (jnp.dot(x, each, preferred_element_type=x.dtype) for each in (first, second))
        return (act(gate.astype(jnp.float32)) * value).astype(x.dtype)

    outs = [np.asarray(each(*given), np.float32) for each in (kernel, plain)]
    error = float(np.abs(outs[0] - outs[1]).max() / np.abs(outs[1]).max())
    said = f"apart by {error:.1e} of the largest value"
    if on_gpu:
        seconds = []
        for each in (kernel, plain, kernel, plain):
            began = time.perf_counter()
            jax.block_until_ready([each(*given) for _ in range(20)])
            seconds.append((time.perf_counter() - began) / 20)
        ours, theirs = min(seconds[::2]), min(seconds[1::2])
        said += (
            f"; {ours * 1e3:.2f} ms, XLA {theirs * 1e3:.2f} ms, {theirs / ours:.2f} times as fast"
        )
    run.tell("gated MLP, Flan-T5-XL", "kernel beside XLA", said)


def make_corpus(run: Run) -> Corpus:
    """Ingest documents of random words, with C4's distribution of lengths."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = ["".join(random.choice(letters, random.integers(2, 8))) for _ in range(400)]
    count = 12 if run.tiny else run.options.documents
    lengths = np.clip(random.lognormal(5.6, 1.0, count) / (8 if run.tiny else 1), 8, 4000)
    texts = [" ".join(random.choice(words, int(length))) for length in lengths]
    (run.place / "documents.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
    )
    vocabulary = run.place / "words.model"
    vocabulary.write_bytes(vocabulary_training.train(texts[:200], 300, words=("yes", "no")))
    ingest.run(
        ingest.IngestConfig(
            source=JsonlSource((str(run.place / "documents.jsonl"),)),
            vocabulary=str(vocabulary),
            output=str(run.place / "corpus"),
            workers=1,
        )
    )
    return load_corpus(run.place / "corpus")


# --------------------------------------------------------------------------------------------------
# Scoring


def score(
    run: Run, what: str, corpus: Corpus, config: ModelConfig, scorer: Any, batch_rows: int
) -> None:
    """Score the corpus by the engine, from disk to disk, after one run that compiles."""
    model = Model(dataclasses.replace(config, dtype="bfloat16"))
    mesh = partitioning.make_mesh({"data": -1}, jax.local_devices()[:1])
    draw = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(key)),
        out_shardings=partitioning.param_shardings(model, mesh),
    )
    loaded = device.Loaded(model, draw(jax.random.key(0)), mesh, "random")
    prepared = scorer.prepare(model, corpus.vocabulary)
    costs = estimate.Costs(config, prepared.sides)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    row_lengths = estimate.choose_row_lengths(prepared, costs, windows, 1024)
    reader = Reader(corpus, None, prepared, row_lengths, batch_rows)
    step = device.Step(prepared, loaded, reader.batch_shapes)
    np.asarray(step(reader.empty_rows()))

    output = tempfile.mkdtemp(dir=run.place)
    schema = schema_of(prepared.columns)
    build = Build(output, "scores", {}, {"corpus": corpus.artifact}, corpus.num_shards, schema)
    started = time.perf_counter()
    engine.score(reader, build.pending(), step, build)
    seconds = time.perf_counter() - started
    count = sum(corpus.documents(shard) for shard in range(corpus.num_shards))
    value = f"{count / seconds:.1f} documents/s, compiled in {step.compile_seconds:.0f} s"
    run.tell(what, "winnow", value, run.share(costs.of(windows), seconds))


def _peer(config: ModelConfig) -> tuple[Any, str]:
    """Return a model of transformers with random weights in bfloat16, and its attention."""
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    if config.has_encoder:
        described: Any = transformers.T5Config(
            vocab_size=config.vocab_size, d_model=config.d_model, d_kv=config.d_kv,
            d_ff=config.d_ff, num_heads=config.num_heads, num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        family = transformers.AutoModelForSeq2SeqLM
    else:
        described = transformers.GPT2Config(
            vocab_size=config.vocab_size, n_embd=config.d_model, n_inner=config.d_ff,
            n_layer=config.num_layers, n_head=config.num_heads, n_positions=1024,
        )  # fmt: skip
        family = transformers.AutoModelForCausalLM
    for attention in ("sdpa", "eager"):  # the faster first; T5 may not have it
        try:
            with torch.device(where):
                model = family.from_config(
                    described, dtype=torch.bfloat16, attn_implementation=attention
                )
            return model.eval(), attention
        except ValueError:
            continue
    raise ValueError("transformers has no attention for this model")


def score_by_transformers(
    run: Run, what: str, corpus: Corpus, config: ModelConfig, scorer: Any, batch_rows: int
) -> None:
    """Score the same documents, sorted by length; token ids are given, and nothing is written."""
    import torch

    model, attention = _peer(config)
    where = next(model.parameters()).device
    forward = torch.compile(model, dynamic=True) if where.type == "cuda" else model
    lengths = np.concatenate(
        [
            corpus.lengths_of(shard, np.arange(corpus.documents(shard)))
            for shard in range(corpus.num_shards)
        ]
    )
    lengths = np.minimum(lengths, CAP)
    order = np.sort(lengths)[::-1]
    batches, at, tokens = [], 0, batch_rows * 1024
    while at < len(order):
        length = -(-int(order[at]) // 64) * 64  # few shapes to compile
        rows = min(max(1, tokens // length), len(order) - at)
        batches.append((rows, length, order[at : at + rows]))
        at += rows
    ask = isinstance(scorer, AskLLM)

    @torch.inference_mode()
    def over(some: list[Any]) -> None:
        for rows, length, real in some:
            ids = torch.randint(3, config.vocab_size, (rows, length), device=where)
            mask = (
                torch.arange(length, device=where)
                < torch.tensor(real.copy(), device=where)[:, None]
            )
            if ask:
                start = torch.zeros((rows, 1), dtype=torch.long, device=where)
                logits = forward(
                    input_ids=ids, attention_mask=mask.long(), decoder_input_ids=start
                ).logits
                torch.log_softmax(logits[:, 0].float(), dim=-1)[:, 5].cpu()
                continue
            if config.has_encoder:
                eos = torch.ones((rows, 1), dtype=torch.long, device=where)
                logits = forward(input_ids=eos, decoder_input_ids=ids).logits
            else:
                logits = forward(input_ids=ids, attention_mask=mask.long()).logits
            chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None])[..., 0]
            (chosen * mask).sum(-1).cpu()

    over(batches if where.type == "cuda" else batches[:1])  # compiles every shape
    started = time.perf_counter()
    over(batches)
    seconds = time.perf_counter() - started
    prepared = scorer.prepare(Model(config), corpus.vocabulary)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    work = estimate.Costs(config, prepared.sides).of(windows)
    value = f"{len(lengths) / seconds:.1f} documents/s, {attention}"
    run.tell(what, "transformers", value, run.share(work, seconds))


# --------------------------------------------------------------------------------------------------
# Training


def _training_sizes(run: Run) -> tuple[int, int, int]:
    return (2, 32, 16) if run.tiny else (32, 512, 114)


def train_steps(run: Run, what: str, shape: ModelConfig, steps: int = 5) -> None:
    """Time steps of train.py."""
    rows, inputs, targets = _training_sizes(run)
    model = Model(
        dataclasses.replace(shape, dtype="bfloat16", dropout_rate=0.0, remat="projections")
    )
    settings: dict[str, Any] = {"output": "", "data": None, "steps": steps, "model": model.config}
    config = train.TrainConfig(**settings)
    optimizer = train.make_optimizer(config, model)
    mesh = partitioning.make_mesh({"data": -1}, jax.local_devices()[:1])
    random = np.random.default_rng(0)
    ids = {
        name: random.integers(2, shape.vocab_size, (rows, length)).astype(np.int32)
        for name, length in (
            ("encoder_input_tokens", inputs),
            ("decoder_input_tokens", targets),
            ("decoder_target_tokens", targets),
        )
    }
    batch = ids | {"decoder_loss_weights": np.ones((rows, targets), np.float32)}
    with partitioning.use(mesh):
        state = jax.jit(
            lambda params: train.State(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
            donate_argnums=0,
        )(jax.jit(model.init)(jax.random.key(0)))
        step = jax.jit(
            train.make_train_step(config, model, optimizer), donate_argnums=0,
            compiler_options=dict(config.compiler_options) or None,
        )  # fmt: skip
        state, _ = jax.block_until_ready(step(state, batch))
        started = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        seconds = (time.perf_counter() - started) / steps
    work = flops.training_flops(model.config, {name: x.shape for name, x in batch.items()})
    value = f"{seconds * 1e3:.0f} ms a step of {rows} rows, loss {loss:.2f}"
    run.tell(what, "winnow", value, run.share(work, seconds))


def train_by_transformers(run: Run, what: str, shape: ModelConfig, steps: int = 5) -> None:
    """Time steps of transformers with its Adafactor, under autocast to bfloat16."""
    import torch
    import transformers

    rows, inputs, targets = _training_sizes(run)
    model, attention = _peer(shape)
    model = model.float().train()
    where = next(model.parameters()).device
    forward = torch.compile(model) if where.type == "cuda" else model
    optimizer = transformers.optimization.Adafactor(
        model.parameters(), lr=1e-3, relative_step=False, scale_parameter=True
    )
    given = torch.randint(2, shape.vocab_size, (rows, inputs), device=where)
    wanted = torch.randint(2, shape.vocab_size, (rows, targets), device=where)

    def step() -> float:
        with torch.autocast(where.type, torch.bfloat16):
            loss = forward(input_ids=given, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step(), step()
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    seconds = (time.perf_counter() - started) / steps
    shapes = {"encoder_input_tokens": (rows, inputs), "decoder_input_tokens": (rows, targets)}
    value = f"{seconds * 1e3:.0f} ms a step of {rows} rows, loss {loss:.2f}, {attention}"
    run.tell(what, "transformers", value, run.share(flops.training_flops(shape, shapes), seconds))


if __name__ == "__main__":
    main()
