"""Training loops of other libraries that take an optimizer and a loss function, and hand no loss to it.

A test is skipped where its library is not installed; ``nox -s clients`` installs all of them.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from greedylr_jax import add_loss_slot, fill_loss_slot, get_scale, greedy_lr, value_from_slot
from tests.greedylr_jax.rules import SCALE_RULES

every_rule = pytest.mark.parametrize("case", SCALE_RULES, ids=lambda case: case.name)


class Recorded:
    """A transformation that keeps the states of its rule, from inside a compiled loop."""

    def __init__(self, case, rate):
        self.scales, self.losses = [], []
        inner = optax.chain(optax.adam(rate), case.transformation())

        def update(updates, state, params=None, *, value, **extra_args):
            updates, state = inner.update(updates, state, params, value=value, **extra_args)
            jax.debug.callback(self._record, value, get_scale(state), ordered=True)
            return updates, state

        self.tx = value_from_slot(optax.GradientTransformationExtraArgs(inner.init, update))
        self.case = case

    def _record(self, value, scale):
        self.losses.append(float(value))
        self.scales.append(float(scale))

    def check(self, losses, rtol=1e-5):
        """The rule saw these losses, and did with them what it does with ``value=``."""
        np.testing.assert_allclose(self.losses, losses, rtol=rtol)
        rule = self.case.transformation()
        state, expected = rule.init(None), []
        for loss in self.losses:
            _, state = rule.update(None, state, value=np.float32(loss))
            expected.append(float(get_scale(state)))
        np.testing.assert_allclose(self.scales, expected, rtol=1e-6)
        assert len(set(expected)) > 1


@every_rule
def test_flowjax(case):
    pytest.importorskip("flowjax")
    from flowjax.distributions import Normal  # noqa: PLC0415
    from flowjax.train import fit_to_key_based_loss  # noqa: PLC0415
    from flowjax.train.losses import MaximumLikelihoodLoss  # noqa: PLC0415

    data = jax.random.normal(jax.random.key(0), (64, 2)) * 3 + 1
    likelihood = MaximumLikelihoodLoss()

    def loss_fn(params, static, key):
        return likelihood(params, static, data, key=key)

    recorded = Recorded(case, 0.1)
    start = Normal(jnp.zeros(2), jnp.ones(2))
    tree, losses = fit_to_key_based_loss(
        jax.random.key(1),
        add_loss_slot(start),
        loss_fn=fill_loss_slot(loss_fn),
        steps=16,
        optimizer=recorded.tx,
        show_progress=False,
    )
    recorded.check(losses)
    assert float(tree.loss_slot) == 0
    assert losses[-1] < losses[0] and isinstance(tree.params, type(start))


def test_flowjax_fit_to_data():
    """Its own loss function, epochs, validation and early stopping."""
    pytest.importorskip("flowjax")
    from flowjax.distributions import Normal  # noqa: PLC0415
    from flowjax.train import fit_to_data  # noqa: PLC0415
    from flowjax.train.losses import MaximumLikelihoodLoss  # noqa: PLC0415

    data = jax.random.normal(jax.random.key(0), (400, 2)) * 3 + 1
    recorded = Recorded(SCALE_RULES[0], 1e-2)
    dist, losses = fit_to_data(
        jax.random.key(1),
        add_loss_slot(Normal(jnp.zeros(2), jnp.ones(2))),
        data,
        loss_fn=fill_loss_slot(MaximumLikelihoodLoss()),
        optimizer=recorded.tx,
        batch_size=120,  # three batches of the 360 examples that are not for validation
        max_epochs=6,
        show_progress=False,
    )
    recorded.check(recorded.losses)
    np.testing.assert_allclose(
        np.mean(np.reshape(recorded.losses, (6, 3)), axis=1), losses["train"], rtol=1e-6
    )
    assert losses["val"][-1] < losses["val"][0] and float(dist.loss_slot) == 0


@every_rule
def test_gpjax(case):
    gpx = pytest.importorskip("gpjax")
    x = jnp.linspace(0, 3, 20).reshape(-1, 1)
    data = gpx.Dataset(X=x, y=jnp.sin(3 * x))
    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF())
    posterior = prior * gpx.likelihoods.Gaussian()

    def objective(model, batch):
        return -gpx.objectives.conjugate_mll(model, batch)

    recorded = Recorded(case, 0.05)
    trained, history = gpx.fit(
        model=add_loss_slot(posterior),
        objective=fill_loss_slot(objective),
        train_data=data,
        optim=recorded.tx,
        num_iters=16,
        verbose=False,
        safe=False,
    )
    recorded.check(history)
    assert float(trained.loss_slot) == 0 and float(objective(trained.params, data)) < float(history[0])


def brax_gradients():
    """The module with brax's update function; brax itself imports a physics engine."""
    found = importlib.util.find_spec("brax")
    if found is None:
        pytest.skip("brax is not installed")
    path = Path(found.submodule_search_locations[0]) / "training" / "gradients.py"
    spec = importlib.util.spec_from_file_location("brax_gradients", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_rule
def test_brax_update_function(case):
    """``gradient_update_fn`` averages gradients over devices, which gives the mean loss."""
    gradients = brax_gradients()

    def loss_fn(params, x):
        return jnp.mean((params - x) ** 2)

    recorded = Recorded(case, 0.05)
    step = gradients.gradient_update_fn(fill_loss_slot(loss_fn), recorded.tx, pmap_axis_name=None)
    params = add_loss_slot(jnp.zeros(3))
    state, losses = recorded.tx.init(params), []
    for x in np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32):
        loss, params, state = jax.jit(step)(params, x, optimizer_state=state)
        losses.append(float(loss))
    recorded.check(losses)


def test_brax_update_function_with_devices():
    gradients = brax_gradients()
    tx = value_from_slot(optax.chain(optax.adam(0.05), greedy_lr(patience=0, window=None)))
    step = gradients.gradient_update_fn(
        fill_loss_slot(lambda params, x: jnp.mean((params - x) ** 2)), tx, pmap_axis_name="i"
    )
    params = add_loss_slot(jnp.zeros(3))
    x = jnp.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    run = jax.vmap(lambda x, state: step(params, x, optimizer_state=state), (0, None), axis_name="i")
    losses, _, state = run(x, tx.init(params))
    np.testing.assert_allclose(losses, [1.0, 9.0])
    np.testing.assert_allclose(state[1].rule.best_value, 5.0)
