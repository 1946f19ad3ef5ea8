"""Inference: likelihoods of continuations and generated text, in batches of packed rows.

    model = inference.load(InferenceConfig("runs/t5"))
    pair = Pair(context=[363, 19, 8], continuation=[1919])
    log_likelihood, greedy = model.log_likelihoods([pair])

Choices
- Pairs of all lengths are packed into rows of one shape and separated by segment ids. This takes
  few compiled programs and little padding, and a pair's value does not depend on its row. Rows and
  batches are no larger than one call needs.
- Logits over the vocabulary are computed at the positions of continuations only: these positions
  are a side of their own in the packing.
- Pairs that differ in the last token only (multiple choice by letters) are computed once.
- A prompt that is too long loses its beginning, as is usual, and is counted.
- An encoder-decoder has the context and EOS in its encoder, and the continuation in its decoder.
  Neither EOS nor sentinels count towards a continuation's likelihood.
- Sums are taken in float64 on the host, in the order of the tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from evaluation.errors import EvaluationError
from models import packing
from models.packing import Side, Windows, offsets_of
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.model.loading import find_tokenizer, require_size
from pruning.scores.model.scorer import Documents
from pruning.store import progress

if TYPE_CHECKING:
    from models.decoding import Beam, Greedy, Sample
    from pruning.corpus.tokenizers import Tokenizer
    from pruning.scores.model.device import Loaded
    from pruning.scores.model.likelihood import Likelihood

_AT_ONCE = 1 << 21  # tokens that are packed together: bounds the host's memory
_LOGITS = 4096  # positions of a batch whose logits are in memory at a time
_CANDIDATES = 8  # last tokens that share a computation, at most
_STEP = 128  # lengths of prompts, and places for answers, are multiples of it
_IN_FLIGHT = 2


class Pair(NamedTuple):
    """Token ids of a context and of a continuation, both without EOS."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """Configuration of a model for inference.

    Attributes:
      model: anything that `models.weights.load` takes: a directory, a training run, a hub name.
      vocabulary: the model's tokenizer, if its directory has none: a SentencePiece file, "bytes",
        a corpus, or a directory with a Hugging Face tokenizer.
      row_length: largest length of a packed row, and of a context with its continuation; at most
        the learned positions of a model that has them.
      batch_rows: rows of a batch, at most, over all of this process's devices.
      dtype: of the parameters and the computation; log-likelihoods are float32 in either case.
      fsdp, tensor: mesh axes; the devices that remain are data-parallel.
      infill: prompt a T5 as in its pretraining by span corruption: the context ends with the first
        sentinel, and the continuation begins with it. For models that were trained on nothing else.
      compilation_cache: where compiled programs are kept; None keeps none.
    """

    model: str
    vocabulary: str | None = None
    row_length: int = 1024
    batch_rows: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    fsdp: int = 1
    tensor: int = 1
    infill: bool = False
    compilation_cache: str | None = "~/.cache/winnow/compiled"

    def __post_init__(self) -> None:
        if self.row_length < _STEP or self.row_length % _STEP:
            raise EvaluationError(f"row_length={self.row_length} must be a multiple of {_STEP}.")

    def identity(self) -> dict[str, Any]:
        """Return the settings that change answers by more than rounding."""
        names = ("row_length", "dtype", "infill")
        return {name: getattr(self, name) for name in names}


def load(config: InferenceConfig) -> Inference:
    """Load the model onto this process's devices.

    Raises:
      VocabularyError: no tokenizer is found, or it has more ids than the model.
      ValueError: the devices do not divide the rows, or the settings do not suit the model.
    """
    from models import runtime
    from pruning.scores.model import device

    if config.compilation_cache is not None:
        runtime.cache_compilations(Path(config.compilation_cache).expanduser())
    loaded = device.load(config.model, config.dtype, config.fsdp, config.tensor)
    tokenizer = find_tokenizer(config.model, config.vocabulary)
    return Inference(config, loaded, tokenizer)


class Inference:
    """A loaded model. `cut` counts the contexts whose beginning was cut so far."""

    def __init__(self, config: InferenceConfig, loaded: Loaded, tokenizer: Tokenizer):
        self.config = config
        self.model = loaded.model
        self.tokenizer = tokenizer
        self.digest = loaded.digest
        self.cut = 0
        self._params = loaded.params
        self._mesh, self._parts = loaded.mesh, loaded.parts
        self._programs: dict[Any, Any] = {}
        shape: Any = self.model.config
        self.has_encoder = shape.has_encoder
        self.max_length = min(config.row_length, shape.max_positions or config.row_length)
        require_size(config.model, shape, tokenizer)
        loaded.require_rows(config.batch_rows)
        if not shape.predicts_tokens:
            raise EvaluationError(
                f"the model {config.model} predicts no tokens: it is an encoder, or has a head in "
                "their place. Give a language model."
            )
        if config.infill and not (self.has_encoder and isinstance(tokenizer, Vocabulary)):
            raise EvaluationError("infill is for a T5 whose vocabulary has sentinels.")

    def identity(self) -> dict[str, Any]:
        """Return what the answers depend on: parameters, tokenizer, settings."""
        return {
            "model": {"config": self.model.config.to_dict(), "digest": self.digest},
            "tokenizer": self.tokenizer.digest,
            **self.config.identity(),
        }

    # ----------------------------------------------------------------------------------------------
    # Likelihoods

    def log_likelihoods(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-likelihood of each continuation after its context.

        Args:
          pairs: a decoder-only model needs a context of at least one token.

        Returns:
          float64 [pairs], natural logarithms (0 for an empty continuation); and bool [pairs],
          whether every token of the continuation is the model's likeliest.

        Raises:
          ValueError: an empty context for a decoder-only model, or a continuation that is longer
            than the model sees at once.
        """
        groups = list(self._grouped(pairs))
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        candidates = max((len(members) for members in groups), default=1)
        candidates = 1 << (candidates - 1).bit_length()
        with progress.track("likelihoods", len(pairs), "pairs") as task:
            for some in self._portions(groups, pairs):
                windows = self._windows(
                    [[pairs[i] for i in members] for members in some], candidates
                )
                values, is_best = self._ask(windows, candidates)
                offsets = windows.sides[-1].offsets
                first = int(self.config.infill)  # the sentinel does not count
                for w, members in enumerate(some):
                    begin, end = offsets[w] + first, offsets[w + 1]
                    for k, pair in enumerate(members):
                        sums[pair] = values[begin:end, k].sum(dtype=np.float64)
                        greedy[pair] = is_best[begin:end, k].all()
                task.advance(sum(map(len, some)))
        return sums, greedy

    def _grouped(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Yield lists of indices of pairs that differ in their last token only."""
        groups: dict[Any, list[int]] = {}
        for i, pair in enumerate(pairs):
            context, continuation = tuple(pair.context), tuple(pair.continuation)
            if not continuation:
                continue
            if not self.has_encoder and not context:
                raise EvaluationError(
                    f"pair {i} has no context: a decoder-only model needs a token to begin with."
                )
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"pair {i} has a continuation of {len(continuation)} tokens; the model sees "
                    f"{self.max_length} at once: raise row_length."
                )
            key = (context, continuation[:-1])
            if len(groups.get(key, ())) == _CANDIDATES:
                yield groups.pop(key)
            groups.setdefault(key, []).append(i)
        yield from groups.values()

    def _portions(
        self, groups: Sequence[list[int]], pairs: Sequence[Pair]
    ) -> Iterator[list[list[int]]]:
        portion: list[list[int]] = []
        tokens = 0
        for members in groups:
            pair = pairs[members[0]]
            portion.append(members)
            tokens += len(pair.context) + len(pair.continuation)
            if tokens > _AT_ONCE:
                yield portion
                portion, tokens = [], 0
        if portion:
            yield portion

    def _windows(self, groups: Sequence[Sequence[Pair]], candidates: int) -> Windows:
        """Return one window per group; its last side holds the tokens to score."""
        inputs, given, targets, places = [], [], [], []
        shape: Any = self.model.config
        start = [shape.start_id] if self.has_encoder else []
        for pair, *_ in groups:
            continuation = [*self._before(), *pair.continuation]
            targets.append(continuation)
            if self.has_encoder:
                given.append(self._encoder_input(pair.context))
                inputs.append(start + continuation[:-1])
            else:
                whole = [*pair.context, *continuation]
                self.cut += len(whole) > self.max_length + 1
                whole = whole[-(self.max_length + 1) :]
                inputs.append(whole[:-1])
                places.append(np.arange(len(whole) - 1 - len(continuation), len(whole) - 1))
        answers = {}
        for k in range(candidates):
            # The tokens before the last are those of all of the group.
            lasts = [group[min(k, len(group) - 1)].continuation[-1] for group in groups]
            wanted = [[*one[:-1], last] for one, last in zip(targets, lasts, strict=True)]
            answers[f"answer_token_{k}"] = _flat(wanted)
        inputs_side = {"decoder_input_tokens": _flat(inputs)}
        if self.has_encoder:
            sides = (
                Side("encoder", _offsets(given), {"encoder_input_tokens": _flat(given)}),
                Side("decoder", _offsets(inputs), inputs_side | answers),
            )
        else:
            answers["answer_position"] = np.concatenate([np.zeros(0, np.int64), *places])
            sides = (
                Side("decoder", _offsets(inputs), inputs_side),
                Side("answer", _offsets(targets), answers),
            )
        return Windows(np.arange(len(groups)), sides)

    def _before(self) -> list[int]:
        """Return the decoder tokens before a continuation."""
        return [self.tokenizer.sentinel(0)] if self.config.infill else []  # type: ignore[attr-defined]

    def _encoder_input(self, context: Sequence[int]) -> list[int]:
        context, eos = list(context), self.model.config.eos_id
        if context[-1:] == [eos]:
            del context[-1]
        end = [*self._before(), eos]
        room = self.max_length - len(end)
        self.cut += len(context) > room
        return context[max(len(context) - room, 0) :] + end

    def _ask(self, windows: Windows, candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Return answers at the last side's positions, float32 and bool [positions, candidates]."""
        lengths = windows.lengths
        packed = packing.pack(lengths, row_lengths(lengths, self.config.row_length))
        rows = packed.fill(windows)
        if not self.has_encoder:
            begins = np.repeat(packed.starts[:, 0], windows.sides[-1].lengths)
            at = packed.positions(windows, 1)
            rows["answer_position"].reshape(-1)[at] += begins.astype(np.int32)
            del rows["answer_segment_ids"]
        found = self._batches(("answers", candidates), rows, packed.num_rows)
        values, is_best = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return packed.gather(windows, values), packed.gather(windows, is_best)

    def _batches(
        self, what: tuple[str, Any], rows: Mapping[str, np.ndarray], count: int
    ) -> list[Any]:
        """Run a program over all rows and return each batch's answers without padding rows."""
        import jax

        from models import partitioning

        size = self._batch_size(count)
        sharding = partitioning.batch_sharding(self._mesh)
        program = self._program(what)
        flying: collections.deque[tuple[Any, int]] = collections.deque()
        found = []

        def land() -> None:
            answers, real = flying.popleft()
            found.append(jax.tree.map(lambda x: np.asarray(x)[:real], answers))

        with partitioning.use(self._mesh):
            for begin in range(0, count, size):
                real = min(size, count - begin)
                batch = {name: _padded(x[begin : begin + real], size) for name, x in rows.items()}
                flying.append((program(self._params, jax.device_put(batch, sharding)), real))
                if len(flying) > _IN_FLIGHT:
                    land()
            while flying:
                land()
        return found

    def _batch_size(self, rows: int) -> int:
        """Return `batch_rows`, or for fewer rows a smaller size that the devices divide."""
        each = max(math.ceil(rows / self._parts), 1)
        return min(self.config.batch_rows, self._parts << (each - 1).bit_length())

    def _program(self, what: tuple[str, Any]) -> Any:
        if what not in self._programs:
            import jax

            kind, setting = what
            step = (
                functools.partial(_answers, self.model, setting)
                if kind == "answers"
                else self._prepared(setting).step
            )
            self._programs[what] = jax.jit(step)
        return self._programs[what]

    def document_log_likelihoods(
        self, documents: Sequence[Sequence[int]], likelihood: Likelihood
    ) -> np.ndarray:
        """Return documents' log-likelihoods under an estimator of `Likelihood`, float64.

        Raises ScoreError where model and estimator do not go together.
        """
        given = Documents.of([list(document) for document in documents])
        prepared = self._prepared(likelihood)
        windows = prepared.windows(given)
        lengths = [max(self.config.row_length, longest) for longest in prepared.longest]
        packed = packing.pack(windows.lengths, lengths)
        found = self._batches(("document", likelihood), packed.fill(windows), packed.num_rows)
        answers = packed.gather(windows, np.concatenate(found)) if found else np.zeros(0)
        scores = prepared.finish(given, windows, answers)
        return -np.asarray(scores.columns["nll"], np.float64)

    def _prepared(self, likelihood: Likelihood) -> Any:
        return likelihood.prepare(self.model, self.tokenizer)  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------------------
    # Text

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        how: Greedy | Sample | Beam | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """Return the continuation of every prompt, without EOS and infilling sentinels.

        Args:
          prompts: token ids; a decoder-only model needs at least one each.
          max_new_tokens: the most tokens of an answer.
          how: see models/decoding.py; greedy by default.
          seed: of `Sample`; batch b draws from (seed, b).
        """
        import jax

        from models import decoding, partitioning

        how = how or decoding.Greedy()
        ends = [self.model.config.eos_id]
        sentinel = self._before()
        if sentinel:
            ends.append(self.tokenizer.sentinel(1))  # type: ignore[attr-defined]
        ready = [self._prompt(prompt, max_new_tokens) for prompt in prompts]
        order = sorted(range(len(ready)), key=lambda i: -len(ready[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        size = self.config.batch_rows
        sharding = partitioning.batch_sharding(self._mesh)
        with (
            progress.track("generate", len(prompts), "texts") as task,
            partitioning.use(self._mesh),
        ):
            for number, begin in enumerate(range(0, len(order), size)):
                some = order[begin : begin + size]
                lengths = np.ones(size, np.int32)
                lengths[: len(some)] = [len(ready[i]) for i in some]
                longest = _STEP * math.ceil(lengths.max() / _STEP)
                if not self.has_encoder:
                    longest = min(longest, self.max_length + 1 - max_new_tokens)
                tokens = np.zeros((size, longest), np.int32)
                for row, i in enumerate(some):
                    tokens[row, : len(ready[i])] = ready[i]
                key = None
                if isinstance(how, decoding.Sample):
                    key = jax.random.fold_in(jax.random.key(seed), number)
                found = decoding.generate(
                    self.model,
                    self._params,
                    jax.device_put(tokens, sharding),
                    max_new_tokens=max_new_tokens + len(sentinel),
                    lengths=jax.device_put(lengths, sharding),
                    how=how,
                    key=key,
                    eos_ids=ends,
                )
                texts, counts = np.asarray(found.tokens), np.asarray(found.lengths)
                for row, i in enumerate(some):
                    text = texts[row, 0] if texts.ndim == 3 else texts[row]
                    count = counts[row, 0] if counts.ndim == 2 else counts[row]
                    skipped = {*ends, *sentinel}
                    answers[i] = [t for t in text[:count].tolist() if t not in skipped]
                task.advance(len(some))
        return answers

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without sentinels and padding ids."""
        if isinstance(self.tokenizer, Vocabulary):
            ids = [token for token in ids if token < self.tokenizer.base_size]
        return self.tokenizer.decode(ids)

    def _prompt(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        if self.has_encoder:
            return self._encoder_input(prompt)
        room = self.max_length + 1 - max_new_tokens
        if room < 1:
            raise EvaluationError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model sees "
                f"{self.max_length} tokens at once."
            )
        if not prompt:
            raise EvaluationError(
                "an empty prompt: a decoder-only model needs a token to begin with."
            )
        self.cut += len(prompt) > room
        return list(prompt)[-room:]


def row_lengths(lengths: np.ndarray, most: int) -> list[int]:
    """Return the lengths of the rows that windows are packed into.

    Args:
      lengths: int64 [windows, sides], at least one side; the answers belong to the last.
      most: positions of a row.

    Returns:
      One length a side: twice the longest window, which wastes little in packing and less in
      attention than longer rows, of a few sizes.
    """
    rows = []
    for longest in lengths.max(axis=0, initial=1).tolist():
        steps = math.ceil(2 * longest / _STEP)
        rows.append(min(_STEP << (steps - 1).bit_length(), most))
    # Places for answers: their share of the rows, with some room, so that neither side waits.
    share = lengths[:, -1].sum() / max(lengths[:, 0].sum(), 1)
    places = max(share, min(1.1 * share, 1.0)) * rows[0]
    wanted = max(places, lengths[:, -1].max(initial=1))
    rows[-1] = min(_STEP * math.ceil(wanted / _STEP), most)
    return rows


def _answers(model: Any, candidates: int, params: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return log P of every candidate token, and whether it is the most likely one.

    Args:
      batch: a model's batch of packed rows; `answer_token_<k>` int32 [rows, answers]; of a
        decoder-only model `answer_position` [rows, answers]: where in the row each is answered.

    Returns:
      float32 and bool [rows, answers, candidates].
    """
    import jax
    import jax.numpy as jnp

    module = model.bind(params)
    hidden = module.forward(batch)  # [rows, length, d_model]
    if "answer_position" in batch:
        hidden = jnp.take_along_axis(hidden, batch["answer_position"][..., None], axis=1)
    targets = jnp.stack([batch[f"answer_token_{k}"] for k in range(candidates)], axis=-1)
    rows, places = targets.shape[:2]
    part = next((n for n in (512, 256, 128, 64, 32) if rows * n <= _LOGITS and places % n == 0), 16)

    def split(x: Any) -> Any:  # [rows, places, ...] -> [parts, rows, part, ...]
        return jnp.moveaxis(x.reshape(rows, -1, part, *x.shape[2:]), 1, 0)

    def ask(given: tuple[Any, Any]) -> tuple[Any, Any]:
        states, wanted = given
        logits = module.logits(states)  # [rows, part, vocab]
        chosen = jnp.take_along_axis(logits, wanted, axis=-1)
        best = jnp.argmax(logits, axis=-1)[..., None] == wanted
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True), best

    values, best = jax.lax.map(ask, (split(hidden), split(targets)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, places, candidates)  # noqa: E731
    return join(values), join(best)


def _flat(lists: Sequence[Sequence[int]]) -> np.ndarray:
    return np.asarray([token for one in lists for token in one], np.int64)


def _offsets(lists: Sequence[Sequence[int]]) -> np.ndarray:
    return offsets_of(np.asarray([len(one) for one in lists], np.int64))


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)))
