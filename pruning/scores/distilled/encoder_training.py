"""Training loop of an encoder that learns a teacher's scores.

Choices
- Training is a few thousand steps on rows of one length. A separate loop is shorter than a
  configuration of the trainer, which is made for restarts and long runs.
- The loss is least squares on scores of mean 0 and variance 1.
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
from models.model import Model
from models.optimizers import WarmupLinear
from pruning.store import progress, randomness
from pruning.store.randomness import Stream


class EncoderTraining:
    """Training of an encoder on the scores of its teacher.

    Attributes:
      model, params: the student; after `run`, its predictions are in the teacher's units.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        tokens: np.ndarray,
        targets: np.ndarray,
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        dtype: str,
    ):
        """Put a student, initialized from the encoder of a model, on the local devices.

        Args:
          model, params: an encoder-decoder, or an encoder.
          tokens: int32 [documents, length], each row a document with EOS; 0 is padding.
          targets: float [documents], the teacher's scores.
          steps, batch_size, learning_rate, seed, dtype: as in `DistillEncoderConfig`.
        """
        self.mesh = partitioning.make_mesh({"data": -1}, devices=jax.local_devices())
        self.model, params = _begin(model, params, seed, dtype)
        self.params = jax.device_put(params, partitioning.replicated(self.mesh))
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed
        self._tokens, self._targets = tokens, targets
        self._batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        sharding = partitioning.batch_sharding(self.mesh)
        self._put = lambda rows: jax.device_put(rows, sharding)
        self._predict = jax.jit(
            lambda params, tokens: self.model.bind(params).pool(tokens)[:, 0, 0]
        )

    def run(self, documents: np.ndarray) -> None:
        """Run all steps on the documents, int [n], rows of `tokens`."""
        known = self._targets[documents]
        mean, spread = known.mean(), known.std() or 1.0
        schedule = WarmupLinear(self.learning_rate, self.steps, self.steps // 20)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

        @jax.jit
        def step(params, state, tokens, targets):
            def loss_of(params):
                return jnp.mean(jnp.square(self._predict(params, tokens) - targets))

            loss, gradient = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        params, state = self.params, optimizer.init(self.params)
        with progress.track("teach", self.steps, "steps") as task:
            for rows in batches(documents, self.steps, self._batch_size, self.seed):
                targets = ((self._targets[rows] - mean) / spread).astype(np.float32)
                tokens = self._put(self._tokens[rows])
                params, state, loss = step(params, state, tokens, self._put(targets))
                task.advance(loss=float(loss))
        kernel = params["projection_layer"]["kernel"] * spread
        self.params = params | {"projection_layer": {"kernel": kernel}}

    def predict(self, documents: np.ndarray) -> np.ndarray:
        """Return predictions, float32 [n], for rows of `tokens`."""
        found = [np.zeros(0, np.float32)]
        size = self._batch_size
        for begin in range(0, len(documents), size):
            rows = documents[begin : begin + size]
            tokens = np.zeros((size, self._tokens.shape[1]), np.int32)
            tokens[: len(rows)] = self._tokens[rows]
            found.append(np.asarray(self._predict(self.params, self._put(tokens)))[: len(rows)])
        return np.concatenate(found)


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


def _begin(given: Model, params: Any, seed: int, dtype: str) -> tuple[Model, Any]:
    """Return the encoder of the given model, with a new projection to one number."""
    changes: dict[str, Any] = {"num_decoder_layers": 0, "sentence_head": 1, "dtype": dtype}
    model = Model(dataclasses.replace(given.config, **changes))
    fresh = jax.jit(model.init)(jax.random.key(seed))
    kept = {name: params[name] for name in ("token_embedder", "encoder")}
    return model, fresh | kept
