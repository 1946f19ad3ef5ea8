"""Training of an encoder's weights on the scores of a teacher.

Choices
- Training is a few thousand steps on short rows. A separate loop is shorter than a configuration of
  the trainer, which is made for restarts and long runs.
- The new layer begins with the ridge regression of the targets on the encoder's pooled outputs, and
  all weights are trained from there. With a random layer, the first steps would distort the
  encoder's features (Kumar et al., arXiv 2202.10054).
- The loss is least squares on scores of mean 0 and variance 1.
- Which documents choose the penalty of that regression is drawn by content: with copies on both
  sides, too small a penalty would win.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import partitioning
from models.config import Head, HeadLayer, ModelConfig
from models.model import Model
from models.optimizers import WarmupLinear
from models.packing import Side
from pruning.scores.distilled.ridge import Sums, best_penalty, held_out
from pruning.store import progress, randomness
from pruning.store.randomness import Stream

_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # in documents, for vectors of mean square length 1


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Configurations of an encoder that is trained.

    Attributes:
      encoder: the encoder, pooled, without layers after it.
      student: the encoder with a head of one value.
    """

    encoder: ModelConfig
    student: ModelConfig

    @classmethod
    def of(cls, config: ModelConfig, max_tokens: int, label: str) -> Shapes:
        """Return the configurations made from that of an encoder, with or without a head, or a T5.

        Args:
          max_tokens: as in `DistillEncoderConfig`.
          label: of the only output.

        Raises:
          ValueError: models of this family have no heads.
        """
        given = config.head
        pooling = "mean" if given is None else given.pooling
        bare = Head(kind="embedding", pooling=pooling, max_tokens=max_tokens)
        if given is not None:
            bare = dataclasses.replace(bare, prompt=given.prompt, lower_case=given.lower_case)
        layers = (HeadLayer(size=1),)
        value = dataclasses.replace(bare, kind="values", layers=layers, labels=(label,))
        return cls(config.with_head(bare), config.with_head(value))


class EncoderTraining:
    """Training of one encoder, from the same initial weights, on the scores of any documents.

    Attributes:
      model: the student, an encoder with a head of one value.
    """

    def __init__(
        self,
        shapes: Shapes,
        params: Any,
        texts: Side,
        targets: np.ndarray,
        hashes: np.ndarray,
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        dtype: str,
    ):
        """Put the encoder on the local devices.

        Args:
          shapes: of the encoder and the student.
          params: of the model that `shapes` was made from.
          texts: the documents as the model reads them, one window each.
          targets: float [documents], the teacher's scores.
          hashes: int64 [documents], of the tokens that are read.
          steps, batch_size, learning_rate, seed, dtype: as in `DistillEncoderConfig`.
        """
        self.mesh = partitioning.make_mesh({"data": -1}, devices=jax.local_devices())
        self._encoder = Model(dataclasses.replace(shapes.encoder, dtype=dtype))
        kept = self._encoder.shapes()
        self._initial = jax.device_put(
            {name: params[name] for name in kept}, partitioning.replicated(self.mesh)
        )
        self.model = Model(dataclasses.replace(shapes.student, dtype=dtype))
        self._steps, self._seed = steps, seed
        self._texts, self._targets = texts, targets
        self._tried = held_out(Stream.ENCODER_STUDENT_PENALTY, seed, hashes)
        self._length = int(np.diff(texts.offsets).max())
        self._batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        sharding = partitioning.batch_sharding(self.mesh)
        self._put = lambda rows: jax.device_put(rows, sharding)
        self._values = jax.jit(lambda params, *rows: self.model.bind(params).pool(*rows)[:, 0, 0])
        schedule = WarmupLinear(learning_rate, steps, steps // 20)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        self._step = jax.jit(self._updated)
        pooled = jax.jit(lambda params, *rows: self._encoder.bind(params).pool(*rows)[:, 0])
        with progress.track("encode", len(targets), "documents") as task:
            parts = self._batches_of(np.arange(len(targets)), pooled, self._initial, task)
            self._vectors = np.concatenate(list(parts))

    def teach(self, documents: np.ndarray) -> Any:
        """Return parameters after all steps on the documents, int [n], indices into `targets`."""
        known = self._targets[documents]
        mean, spread = known.mean(), known.std() or 1.0
        kernel, bias = self._layer(documents, (known - mean) / spread)
        params = self._with_layer(self._initial, kernel, bias)
        # Placed as `_step` returns it, which is compiled a second time otherwise.
        state = jax.device_put(self._optimizer.init(params), partitioning.replicated(self.mesh))
        with progress.track("teach", self._steps, "steps") as task:
            for batch in batches(documents, self._steps, self._batch_size, self._seed):
                targets = ((self._targets[batch] - mean) / spread).astype(np.float32)
                given = self._put(targets), *self._rows(batch)
                params, state, loss = self._step(params, state, *given)
                task.advance(loss=float(loss))
        layer = params["head"]["dense_0"]["linear"]
        return self._with_layer(params, layer["kernel"] * spread, layer["bias"] * spread + mean)

    def _updated(self, params: Any, state: Any, targets: jax.Array, *rows: jax.Array) -> Any:
        """Return parameters and state after a step, and the loss before it."""

        def loss_of(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(self._values(params, *rows) - targets))

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = self._optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def predict(self, params: Any, documents: np.ndarray) -> np.ndarray:
        """Return a student's values of documents, float32 [n]."""
        with progress.track("predict", len(documents), "documents") as task:
            parts = self._batches_of(documents, self._values, params, task)
            return np.concatenate([np.zeros(0, np.float32), *parts])

    def linear(self, fold: np.ndarray) -> np.ndarray:
        """Return predictions of the ridge regression on the initial encoder, float64 [documents].

        Args:
          fold: int [documents]; each document is predicted without those of its fold.
        """
        found = np.zeros(len(fold))
        for k in np.unique(fold):
            kernel, bias = self._layer(np.flatnonzero(fold != k), self._targets[fold != k])
            found[fold == k] = self._vectors[fold == k] @ kernel[:, 0] + bias[0]
        return found

    def _batches_of(
        self, documents: np.ndarray, function: Any, params: Any, task: progress.Task
    ) -> Iterator[np.ndarray]:
        for begin in range(0, len(documents), self._batch_size):
            batch = documents[begin : begin + self._batch_size]
            yield np.asarray(function(params, *self._rows(batch)))[: len(batch)]
            task.advance(len(batch))

    def _rows(self, documents: np.ndarray) -> tuple[Any, Any]:
        """Return tokens and segment ids, int32 [batch size, length] each, on the devices."""
        tokens = np.full((self._batch_size, self._length), self.model.config.pad_id, np.int32)
        segments = np.zeros_like(tokens)
        flat = next(iter(self._texts.features.values()))
        for row, document in enumerate(documents):
            begin, end = self._texts.offsets[document : document + 2]
            tokens[row, : end - begin] = flat[begin:end]
            segments[row, : end - begin] = 1
        return self._put(tokens), self._put(segments)

    def _layer(self, documents: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel [width, 1] and bias [1] of the ridge regression on pooled outputs."""
        vectors = self._vectors[documents]
        center = vectors.mean(axis=0)
        scale = float(np.sqrt(np.square(vectors - center).sum(axis=1).mean())) or 1.0
        vectors = (vectors - center) / scale
        tried = self._tried[documents]
        rest = Sums.of(vectors[~tried], targets[~tried])
        asked = Sums.of(vectors[tried], targets[tried])
        found = (rest + asked).fit(best_penalty(rest, asked, _PENALTIES, _PENALTIES[-1]))
        weights = found[:-1] / scale
        return weights[:, None], np.array([found[-1] - center @ weights])

    def _with_layer(self, params: Any, kernel: Any, bias: Any) -> Any:
        linear = {"kernel": kernel, "bias": bias}
        linear = {name: jnp.asarray(value, jnp.float32) for name, value in linear.items()}
        placed = jax.device_put(linear, partitioning.replicated(self.mesh))
        return {**params, "head": {"dense_0": {"linear": placed}}}


def batches(documents: np.ndarray, steps: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the documents of each step, int [size], epoch after epoch in a new order."""
    count = len(documents)
    for index in range(steps):
        places = np.arange(index * size, (index + 1) * size)
        first = places[0] // count
        order = [
            randomness.generator(Stream.EXAMPLE_ORDER, seed, int(epoch)).permutation(count)
            for epoch in range(first, places[-1] // count + 1)
        ]
        yield documents[np.concatenate(order)[places - first * count]]
