"""Adafactor against a float64 reference, stacked or unrolled; schedules; axes of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import optimizers

LAYERS = 3
# Name -> (shape of one layer, logical axes of one layer). Some factored, some not.
SHAPES = {
    "square": ((128, 192), ("embed", "mlp")),
    "wide": ((130, 128), ("mlp", "embed")),
    "narrow": ((32, 256), ("relpos_heads", "embed")),  # 32 < 128: not factored
    "scale": ((160,), ("embed",)),
}


def layer_params(seed: int) -> dict[str, np.ndarray]:
    """One layer's parameters; the scale differs by layer, which is what stacking must not mix."""
    rng = np.random.default_rng(seed)
    return {
        name: (10.0 ** (seed - 1) * rng.normal(size=shape)).astype(np.float32)
        for name, (shape, _) in SHAPES.items()
    }


def layer_gradients(seed: int, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, step])
    size = 10.0 ** rng.integers(-4, 3)  # some updates are clipped, some are not
    return {
        name: (size * rng.normal(size=shape) * rng.exponential(size=shape)).astype(np.float32)
        for name, (shape, _) in SHAPES.items()
    }


def reference_adafactor(params: dict, gradients: list[dict], rate) -> dict:
    """Adafactor of one layer, a matrix at a time, written from the paper in plain NumPy float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    rows, columns, full = {}, {}, {}
    for t, gradient in enumerate(gradients, start=1):
        beta2 = 1 - t**-0.8
        for name, x in params.items():
            g = gradient[name].astype(np.float64)
            squared = g * g + 1e-30
            if x.ndim == 2 and min(x.shape) >= 128:
                r = rows.get(name, np.zeros(x.shape[0]))
                c = columns.get(name, np.zeros(x.shape[1]))
                rows[name] = r = beta2 * r + (1 - beta2) * squared.mean(1)
                columns[name] = c = beta2 * c + (1 - beta2) * squared.mean(0)
                v = np.outer(r, c) / r.mean()
            else:
                v = beta2 * full.get(name, np.zeros(x.shape)) + (1 - beta2) * squared
                full[name] = v
            u = g / np.sqrt(v)
            u /= max(1.0, np.sqrt(np.mean(u * u)) / 1.0)
            params[name] = x - rate(t - 1) * max(np.sqrt(np.mean(x * x)), 1e-3) * u
    return params


def train(params, axes, gradients, schedule):
    optimizer = optimizers.adafactor(schedule, axes)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def test_adafactor_equals_the_float64_reference_over_50_steps_stacked_or_not():
    steps = 50
    gradients = [[layer_gradients(k, t) for t in range(steps)] for k in range(LAYERS)]
    expected = [
        reference_adafactor(layer_params(k), gradients[k], lambda t: 0.05 / np.sqrt(max(t, 10)))
        for k in range(LAYERS)
    ]
    schedule = optimizers.InverseSquareRoot(scale=0.05, offset=10)
    axes = {name: names for name, (_, names) in SHAPES.items()}
    for k in range(LAYERS):
        single, _ = train(layer_params(k), axes, gradients[k], schedule)
        for name in SHAPES:
            np.testing.assert_allclose(
                single[name], expected[k][name], rtol=0, atol=2e-6 * np.abs(expected[k][name]).max()
            )
    stacked, state = train(
        stack([layer_params(k) for k in range(LAYERS)]),
        {name: ("layers", *names) for name, names in axes.items()},
        [stack([gradients[k][t] for k in range(LAYERS)]) for t in range(steps)],
        schedule,
    )
    for name in SHAPES:
        for k in range(LAYERS):
            np.testing.assert_allclose(
                stacked[name][k],
                expected[k][name],
                rtol=0,
                atol=2e-6 * np.abs(expected[k][name]).max(),
                err_msg=f"{name} layer {k}",
            )
    assert {name: set(slot) for name, slot in state.slots.items()} == {
        "square": {"v_row", "v_col"},
        "wide": {"v_row", "v_col"},
        "narrow": {"v"},
        "scale": {"v"},
    }
    assert int(state.step) == steps


def test_a_layer_of_a_stack_is_not_moved_by_another_layers_gradient():
    axes = {"w": ("layers", "embed", "mlp")}
    params = {"w": jnp.ones((2, 128, 128))}
    gradient = {"w": jnp.zeros((2, 128, 128)).at[1].set(1.0)}
    after, _ = train(params, axes, [gradient], optimizers.Constant(0.1))
    assert np.array_equal(after["w"][0], params["w"][0])
    np.testing.assert_allclose(after["w"][1], 0.9, rtol=1e-6)


def test_t5_schedule_values():
    schedule = optimizers.InverseSquareRoot()
    for step, value in [(0, 0.01), (9_999, 0.01), (10_000, 0.01), (1_000_000, 0.001)]:
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6)
    assert float(schedule(40_000)) == pytest.approx(0.005, rel=1e-6)


@pytest.mark.parametrize("kind", [optimizers.WarmupLinear, optimizers.WarmupCosine])
def test_warmup_and_decay_pass_through_their_corners(kind):
    schedule = kind(peak=0.5, total_steps=110, warmup_steps=10, final=0.1)
    assert float(schedule(0)) == pytest.approx(0.05)
    assert float(schedule(9)) == pytest.approx(0.5)
    assert float(schedule(10)) == pytest.approx(0.5)
    assert float(schedule(60)) == pytest.approx(0.3)  # half-way, both shapes
    assert float(schedule(110)) == pytest.approx(0.1)
    assert float(schedule(500)) == pytest.approx(0.1)
    rates = jax.vmap(schedule)(jnp.arange(10, 111))
    assert bool((jnp.diff(rates) <= 0).all())


def test_cosine_and_linear_agree_with_optax():
    steps = np.arange(0, 1000, 7)
    cosine = optax.cosine_decay_schedule(0.3, 900, alpha=0.1)
    ours = optimizers.WarmupCosine(peak=0.3, total_steps=900, final=0.03)
    np.testing.assert_allclose(jax.vmap(ours)(steps), jax.vmap(cosine)(steps), rtol=1e-5)
    linear = optax.linear_schedule(0.3, 0.03, 900)
    ours = optimizers.WarmupLinear(peak=0.3, total_steps=900, final=0.03)
    np.testing.assert_allclose(jax.vmap(ours)(steps), jax.vmap(linear)(steps), rtol=1e-5)


def test_adamw_decays_matrices_and_leaves_vectors():
    axes = {"kernel": ("layers", "embed", "mlp"), "scale": ("layers", "embed")}
    params = {"kernel": jnp.ones((2, 8, 8)), "scale": jnp.ones((2, 8))}
    optimizer = optimizers.AdamW(optimizers.Constant(0.1), weight_decay=0.5).build(axes)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not updates["scale"].any()


def test_muon_orthogonalises_each_layer_by_itself_and_leaves_tables_to_adam():
    axes = {
        "kernel": ("layers", "embed", "mlp"),
        "scale": ("layers", "embed"),
        "embedding": ("vocab", "embed"),
    }
    rng = np.random.default_rng(0)
    gradients = {
        "kernel": np.stack([10.0**k * rng.normal(size=(24, 40)) for k in range(LAYERS)]),
        "scale": rng.normal(size=(LAYERS, 24)),
        "embedding": rng.normal(size=(50, 24)),
    }
    gradients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients)
    params = jax.tree.map(jnp.zeros_like, gradients)
    config = optimizers.Muon(optimizers.Constant(0.1), update_rms=0.2)

    def first_update(axes, params, gradients):
        optimizer = config.build(axes)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    updates = first_update(axes, params, gradients)
    for k in range(LAYERS):
        update = -np.asarray(updates["kernel"][k], np.float64) / 0.1
        # Singular values that are all about one size; the same vectors as the gradient's.
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(40))
        assert values.min() > 0.6 and values.max() < 1.3
        left, _, right = np.linalg.svd(gradients["kernel"][k], full_matrices=False)
        turned = left.T @ update @ right.T
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=0.02)
        alone = first_update(
            {"kernel": ("embed", "mlp")},
            {"kernel": params["kernel"][k]},
            {"kernel": gradients["kernel"][k]},
        )
        np.testing.assert_allclose(alone["kernel"], updates["kernel"][k], rtol=1e-4, atol=1e-6)
    adam = optax.nadamw(0.1, 0.9, 0.95, weight_decay=0.0)
    expected = adam.update(gradients, adam.init(params), params)[0]
    for name in ("scale", "embedding"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("config", [optimizers.Adafactor(), optimizers.AdamW(), optimizers.Muon()])
def test_state_axes_follow_the_parameters(config):
    axes = {
        "encoder": {"wi": ("layers", "embed", "mlp"), "scale": ("layers", "embed")},
        "embedding": ("vocab", "embed"),
    }
    params = {
        "encoder": {"wi": jnp.ones((2, 128, 256)), "scale": jnp.ones((2, 128))},
        "embedding": jnp.ones((300, 128)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), config.build(axes))
    state = jax.eval_shape(optimizer.init, params)
    leaves, structure = jax.tree.flatten(state)
    names = structure.flatten_up_to(optimizers.state_axes(state, params, axes))
    by_name = {(leaf.shape, axes) for leaf, axes in zip(leaves, names, strict=True)}
    assert all(len(shape) == len(axes) for shape, axes in by_name)
    if isinstance(config, optimizers.Adafactor):
        assert ((2, 128), ("layers", "embed")) in by_name  # rows of wi
        assert ((2, 256), ("layers", "mlp")) in by_name  # columns of wi
        assert ((300,), ("vocab",)) in by_name
    else:
        assert ((2, 128, 256), ("layers", "embed", "mlp")) in by_name


def test_state_axes_refuse_what_follows_from_no_parameter():
    params, axes = {"w": jnp.ones((4, 5))}, {"w": ("embed", "mlp")}
    with pytest.raises(ValueError, match="follows from no parameter"):
        optimizers.state_axes({"w": jnp.ones((7,))}, params, axes)
