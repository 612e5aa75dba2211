"""Hypergradient descent: reference runs, granularities, modes, bounds, and the readers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import get_learning_rate, hypergradient, metrics
from tests.greedylr_jax.rules import mostly_slow
from tests.reference_data import read_fixtures, read_full

FIXTURES = read_fixtures("hypergradient_traces.json")
FULL = read_full("hypergradient/hypergradient.jsonl")


def heavy_ball(momentum, dampening):
    """torch's momentum buffer: the first is the plain gradient, dampening applies from the second on."""

    def init(params):
        return jnp.zeros((), jnp.int32), optax.tree.zeros_like(params)

    def update(updates, state, params=None):
        del params
        count, buffer = state
        gain = jnp.where(count == 0, 1.0, 1 - dampening)
        buffer = jax.tree.map(lambda b, g: momentum * b + gain * g, buffer, updates)
        return jax.tree.map(jnp.negative, buffer), (count + 1, buffer)

    return optax.GradientTransformation(init, update)


def reference_adam(b1, b2, eps):
    """Adam of the reference runs: eps is added to the root before bias correction."""

    def init(params):
        return jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params)

    def update(updates, state, params=None):
        del params
        count, mean, square = state
        count = count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mean, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, square, updates)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        steps = jax.tree.map(lambda m, v: -correction * m / (jnp.sqrt(v) + eps), mean, square)
        return steps, (count, mean, square)

    return optax.GradientTransformation(init, update)


def inner_of(trace):
    config = trace["config"]
    if trace["algorithm"] == "adam_hd":
        return reference_adam(*config["betas"], config["eps"])
    if trace["algorithm"] == "sgd_hd_per_parameter" or not config["momentum"]:
        return optax.sgd(1.0)
    if config["nesterov"]:
        assert not config["dampening"]
        return optax.sgd(1.0, config["momentum"], nesterov=True)
    return heavy_ball(config["momentum"], config["dampening"])


def objective(problem):
    if problem["kind"] == "rosenbrock":
        return lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    matrix, vector = np.array(problem["A"]), np.array(problem["b"])
    return lambda x: 0.5 * x @ matrix @ x - vector @ x


def run_trace(trace, inner):
    config = trace["config"]
    per_parameter = trace["algorithm"] == "sgd_hd_per_parameter"
    rate = np.array(config["lr"]) if per_parameter else config["lr"]
    tx = optax.chain(
        optax.add_decayed_weights(config.get("weight_decay", 0.0)),
        hypergradient(
            inner,
            rate,
            config["hypergrad_lr"],
            granularity="parameter" if per_parameter else "global",
        ),
    )
    loss_fn = objective(trace["problem"])

    def body(carry, _):
        x, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(x)
        updates, state = tx.update(grads, state, x)
        return (optax.apply_updates(x, updates), state), (loss, get_learning_rate(state))

    x = jnp.array(trace["x0"])
    (x, _), (loss, rates) = jax.lax.scan(body, (x, tx.init(x)), None, length=trace["steps"])
    return x, loss, rates


@pytest.mark.parametrize(
    "trace",
    [*FIXTURES, *(pytest.param(trace, marks=pytest.mark.slow) for trace in FULL)],
    ids=lambda trace: f"{trace['algorithm']}-{trace['id'][-4:]}",
)
def test_reference_runs_to_1e_8(trace):
    with jax.enable_x64(True):
        x, loss, rates = run_trace(trace, inner_of(trace))
    np.testing.assert_allclose(rates, np.array(trace["lr"]), rtol=1e-8, atol=1e-17)
    np.testing.assert_allclose(loss, trace["loss"], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(x, trace["x_last"], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "trace", [trace for trace in FIXTURES if trace["algorithm"] == "adam_hd"], ids=lambda trace: trace["id"]
)
def test_reference_runs_of_adam_with_that_of_optax_to_1e_5(trace):
    """Optax adds eps after bias correction."""
    config = trace["config"]
    with jax.enable_x64(True):
        inner = optax.adam(1.0, *config["betas"], eps=config["eps"])
        _, loss, rates = run_trace(trace, inner)
    np.testing.assert_allclose(rates, np.array(trace["lr"]), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(loss, trace["loss"], rtol=1e-5, atol=1e-6)


def test_the_fixtures_cover_all_algorithms():
    algorithms = {trace["algorithm"] for trace in FIXTURES}
    assert algorithms == {"sgd_hd", "sgdn_hd", "adam_hd", "sgd_hd_per_parameter"}


PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
GRADS = [
    {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[-1.0]])},
    {"a": jnp.array([0.5, 1.0]), "b": jnp.array([[2.0]])},
]


def two_steps(tx):
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS[0], state, PARAMS)
    return tx.update(GRADS[1], state, PARAMS)


def test_global_rate_by_hand():
    """<g_1, g_0> = 0.5 + 2 - 2 = 0.5; its cosine 0.5 / sqrt(6 * 5.25)."""
    updates, state = two_steps(hypergradient(optax.sgd(1.0), 0.1, 0.01))
    np.testing.assert_allclose(get_learning_rate(state), 0.1 + 0.01 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["a"], -0.105 * GRADS[1]["a"], rtol=1e-6)
    _, state = two_steps(hypergradient(optax.sgd(1.0), 0.1, 0.5, mode="multiplicative"))
    np.testing.assert_allclose(get_learning_rate(state), 0.1 * (1 + 0.5 * 0.5 / np.sqrt(6 * 5.25)), rtol=1e-6)


def test_group_rates_by_hand():
    labels = {"a": "first", "b": "second"}
    for given in (labels, lambda params: labels):
        tx = hypergradient(optax.sgd(1.0), 0.1, 0.01, granularity="group", param_labels=given)
        updates, state = two_steps(tx)
        np.testing.assert_allclose(get_learning_rate(state, group="first"), 0.1 + 0.01 * 2.5, rtol=1e-6)
        np.testing.assert_allclose(get_learning_rate(state, group="second"), 0.1 - 0.01 * 2, rtol=1e-6)
        np.testing.assert_allclose(updates["b"], -0.08 * GRADS[1]["b"], rtol=1e-6)
        assert set(metrics(state)) == {"first/learning_rate", "second/learning_rate"}
        with pytest.raises(ValueError, match=r"('first'|'second') at opt_state"):
            get_learning_rate(state)


def test_element_rates_by_hand():
    tx = hypergradient(optax.sgd(1.0), 0.1, 0.01, granularity="parameter")
    updates, state = two_steps(tx)
    expected = {"a": 0.1 + 0.01 * np.array([0.5, 2.0]), "b": np.array([[0.1 - 0.02]])}
    chex.assert_trees_all_close(get_learning_rate(state), expected, rtol=1e-6)
    np.testing.assert_allclose(updates["a"], -expected["a"] * GRADS[1]["a"], rtol=1e-6)
    read = metrics(state)
    np.testing.assert_allclose(
        [read["learning_rate_min"], read["learning_rate_max"]], [0.08, 0.12], rtol=1e-6
    )
    tx = hypergradient(optax.sgd(1.0), 0.1, 0.5, granularity="parameter", mode="multiplicative")
    rates = get_learning_rate(two_steps(tx)[1])
    np.testing.assert_allclose(rates["a"], [0.15, 0.15], rtol=1e-6)
    np.testing.assert_allclose(rates["b"], [[0.05]], rtol=1e-6)


@pytest.mark.parametrize("granularity", ["global", "group", "parameter"])
@pytest.mark.parametrize("mode", ["additive", "multiplicative"])
class TestEveryKind:
    """Properties of every granularity and mode."""

    @staticmethod
    def make(mode, granularity, momentum=0.9, **options):
        labels = {"a": "first", "b": "second"} if granularity == "group" else None
        rates = {"learning_rate": 0.1, "hyper_learning_rate": 0.05}
        arguments = rates | dict(mode=mode, granularity=granularity, param_labels=labels) | options
        return hypergradient(optax.sgd(1.0, momentum=momentum), **arguments)

    def test_multiplicative_mode_does_not_depend_on_the_scale_of_the_gradients(self, mode, granularity):
        tx = self.make(mode, granularity)
        plain, scaled = (self.rates_after(tx, factor) for factor in (1.0, 2.0**10))
        if mode == "multiplicative":
            chex.assert_trees_all_close(plain, scaled, rtol=1e-6)
        else:
            assert not np.allclose(jax.tree.leaves(plain)[0], jax.tree.leaves(scaled)[0])

    @staticmethod
    def rates_after(tx, factor):
        state = tx.init(PARAMS)
        for grads in GRADS:
            _, state = tx.update(jax.tree.map(lambda leaf: factor * leaf, grads), state, PARAMS)
        return state.rate

    def test_rates_stay_within_bounds_and_ignore_gradients_that_are_not_finite(self, mode, granularity):
        bounds = {"min_learning_rate": 0.09, "max_learning_rate": 0.11}
        tx = self.make(mode, granularity, momentum=None, **bounds)  # momentum would stay NaN
        state, seen = tx.init(PARAMS), []
        update = jax.jit(tx.update)
        for step in range(30):
            sign = -1.0 if step < 15 else 1.0
            grads = jax.tree.map(lambda leaf, sign=sign, step=step: 100 * leaf * sign**step, GRADS[0])
            if step % 7 == 3:
                grads = jax.tree.map(lambda leaf: leaf * jnp.nan, grads)
            before = state
            _, state = update(grads, state, PARAMS)
            for rate in jax.tree.leaves(state.rate):
                assert (rate >= 0.09 - 1e-6).all() and (rate <= 0.11 + 1e-6).all()
                seen.extend(np.ravel(rate))
            if step % 7 == 3:
                chex.assert_trees_all_equal(state.rate, before.rate)
        np.testing.assert_allclose([min(seen), max(seen)], [0.09, 0.11], rtol=1e-6)

    def test_rates_are_float32_and_steps_keep_bfloat16(self, mode, granularity):
        tx = self.make(mode, granularity)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
        chex.assert_trees_all_equal_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.rate))

    def test_a_step_transfers_nothing_and_its_state_can_be_donated(self, mode, granularity):
        tx = self.make(mode, granularity)
        state, expected, plain = tx.init(PARAMS), tx.init(PARAMS), jax.jit(tx.update)
        with jax.transfer_guard("disallow"):
            step = jax.jit(tx.update, donate_argnums=1)
            for _ in range(3):
                before = state
                _, state = step(GRADS[0], state, PARAMS)
                _, expected = plain(GRADS[0], expected, PARAMS)
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        chex.assert_trees_all_equal(state, expected)

    def test_the_loss_decreases_inside_common_wrappers(self, mode, granularity):
        tx = self.make(mode, granularity, learning_rate=0.02, hyper_learning_rate=1e-4)
        for wrap in (
            lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
            lambda tx: optax.apply_if_finite(tx, 3),
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: greedylr_jax.chain(greedylr_jax.greedy_lr(), tx),
        ):
            wrapped, params = wrap(tx), PARAMS

            def loss_fn(params):
                return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

            def body(carry, _, wrapped=wrapped):
                params, state = carry
                loss, grads = jax.value_and_grad(loss_fn)(params)
                updates, state = wrapped.update(grads, state, params, value=loss)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(body, (params, wrapped.init(params)), None, length=20)
            assert loss_fn(params) < 0.7 * loss_fn(PARAMS)


def test_hyperparameters_may_be_traced():
    def final_rate(beta, rate):
        _, state = two_steps(hypergradient(optax.sgd(1.0), rate, beta, max_learning_rate=10 * rate))
        return get_learning_rate(state)

    betas, rates = jnp.array([0.0, 0.01, 0.1]), jnp.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(jax.vmap(final_rate)(betas, rates), rates + betas * 0.5, rtol=1e-6)


def test_combined_with_greedy_lr_the_learning_rates_are_multiplied():
    rule = greedylr_jax.greedy_lr(0.5, 0, window=None)
    tx = optax.chain(hypergradient(optax.sgd(1.0), 0.1, 0.01), rule)
    state = tx.init(PARAMS)
    for grads, value in zip(GRADS, (2.0, 1.0), strict=True):
        updates, state = tx.update(grads, state, PARAMS, value=value)
    np.testing.assert_allclose(get_learning_rate(state), 4 * 0.105, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -4 * 0.105 * GRADS[1]["b"], rtol=1e-6)
    greedylr_jax.assert_controls_learning_rate(tx, PARAMS)
    read = metrics(state)
    assert read["scale"] == 4.0 and np.isclose(read["learning_rate"], 0.105)


def test_integer_leaves_have_no_learning_rate():
    params = {"w": jnp.ones(2), "steps": jnp.arange(3)}
    for granularity in ("global", "parameter"):
        inner = optax.masked(optax.sgd(1.0), {"w": True, "steps": False})
        tx = hypergradient(inner, 0.1, 0.01, granularity=granularity)
        updates, state = tx.update(params, tx.init(params), params)
        updates, _ = tx.update(params, state, params)
        np.testing.assert_array_equal(updates["steps"], params["steps"])
        assert (updates["w"] < -0.1).all()


@pytest.mark.parametrize("granularity", ["global", "parameter"])
def test_the_rate_of_a_tree_without_leaves_does_not_change(granularity):
    tx = hypergradient(optax.sgd(1.0), 0.1, 0.01, granularity=granularity)
    state = tx.init({})
    updates, after = tx.update({}, state, {})
    assert updates == {}
    chex.assert_trees_all_equal(after.rate, state.rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -0.1}, r"learning_rate must be a number in \[0, inf\)"),
        ({"hyper_learning_rate": np.inf}, "hyper_learning_rate must be"),
        ({"mode": "add"}, "mode must be one of 'additive', 'multiplicative'"),
        ({"granularity": "layer"}, "granularity must be one of"),
        ({"granularity": "group"}, "param_labels must be given if and only if"),
        ({"param_labels": {"a": "x", "b": "y"}}, "param_labels must be given"),
        (
            {"min_learning_rate": 1.0, "max_learning_rate": 0.5},
            "min_learning_rate must not exceed max_learning_rate",
        ),
        (
            {"granularity": "group", "param_labels": {"a": "x", "b": "y"}, "learning_rate": {"x": 0.1}},
            r"one rate for each label \['x', 'y'\], got \['x'\]",
        ),
        ({"granularity": "parameter", "learning_rate": {"a": 0.1}}, "pytree like the parameters"),
    ],
)
def test_invalid_arguments_raise(options, message):
    arguments = {"learning_rate": 0.1, "hyper_learning_rate": 0.01} | options
    with pytest.raises(ValueError, match=message):
        hypergradient(optax.sgd(1.0), **arguments).init(PARAMS)


LABELS = {"a": "first", "b": "second"}
GRANULARITIES = ("global", "group", "parameter")


def make(granularity, inner=None, **options):
    inner = optax.sgd(1.0, momentum=0.9) if inner is None else inner
    arguments = {"param_labels": LABELS} if granularity == "group" else {}
    arguments = {"learning_rate": 0.05, "hyper_learning_rate": 1e-2} | arguments | options
    return hypergradient(inner, granularity=granularity, **arguments)


def final_rates(tx, params, curvature):
    """The learning rates after ten steps on a quadratic."""

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.multiply, curvature, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=10)
    return state.rate.learning_rate


@pytest.mark.parametrize(
    "layout", mostly_slow(["sharded", "replicated", "mixed", "two axes"], "sharded", "mixed")
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", mostly_slow(["additive", "multiplicative"], "additive"))
def test_under_shard_map_learning_rates_equal_those_of_one_device(layout, granularity, mode):
    spec = jax.sharding.PartitionSpec
    axes = ("x", "y") if layout == "two axes" else "x"
    specs = {"a": spec() if layout == "replicated" else spec(axes)}
    specs["b"] = spec(axes) if layout in ("sharded", "two axes") else spec()
    params = {"a": jnp.linspace(1.0, 2.0, 8), "b": jnp.ones(8)}
    curvature = {"a": jnp.linspace(0.1, 2.0, 8), "b": jnp.linspace(0.0, 1.0, 8)}
    expected = final_rates(make(granularity, mode=mode), params, curvature)

    def run(params, curvature):
        return final_rates(make(granularity, mode=mode, axis_name=axes), params, curvature)

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    out_specs = specs if granularity == "parameter" else spec()
    for check_vma in (True, False):
        if not check_vma and layout in ("replicated", "mixed"):
            continue  # the types of the arrays do not tell which leaves are replicated
        mapped = jax.shard_map(
            run, mesh=mesh, in_specs=(specs, specs), out_specs=out_specs, check_vma=check_vma
        )
        chex.assert_trees_all_close(jax.jit(mapped)(params, curvature), expected, rtol=1e-5)


def test_without_an_axis_name_devices_with_sharded_parameters_would_disagree():
    spec = jax.sharding.PartitionSpec("x")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda *args: final_rates(make("global"), *args)[None],
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    params = {"a": jnp.linspace(1.0, 2.0, 8), "b": jnp.ones(8)}
    curvature = {"a": jnp.linspace(0.1, 2.0, 8), "b": jnp.linspace(0.0, 1.0, 8)}
    rates = jax.jit(mapped)(params, curvature)
    assert len(set(np.asarray(rates).tolist())) > 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rate", ["number", "tree"])
def test_state_has_the_sharding_of_the_parameters_on_an_explicit_mesh(granularity, rate):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
        params = {"a": jax.device_put(jnp.ones((8, 4)), sharding), "b": jnp.ones(3)}
        options = {}
        if rate == "tree" and granularity != "global":
            tree = {"group": {"first": 0.1, "second": 0.2}, "parameter": {"a": jnp.full(4, 0.1), "b": 0.2}}
            options["learning_rate"] = tree[granularity]
        tx = make(granularity, optax.adam(1.0), **options)
        state = tx.init(params)
        chex.assert_trees_all_equal(
            jax.tree.map(jax.typeof, jax.jit(tx.init)(params)), jax.tree.map(jax.typeof, state)
        )
        for _ in range(2):
            updates, new_state = jax.jit(tx.update)(params, state, params)
            assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
            state = new_state
        if granularity == "parameter":
            assert jax.typeof(state.rate.learning_rate["a"]).sharding.spec == sharding.spec


class Labels(dict):
    """A pytree of labels that is callable, as a module in which strings take the place of arrays."""

    def __call__(self, x):
        raise TypeError("not a function of parameters")


jax.tree_util.register_pytree_with_keys(
    Labels,
    lambda tree: ([(jax.tree_util.DictKey(key), tree[key]) for key in sorted(tree)], tuple(sorted(tree))),
    lambda keys, values: Labels(zip(keys, values, strict=True)),
)


@pytest.mark.parametrize(
    ("wrap", "labels"),
    [
        (dict, LABELS),
        (dict, lambda params: LABELS),
        (dict, jax.tree_util.Partial(lambda params: LABELS)),
        (dict, jax.tree_util.Partial(lambda second, params: {"a": "first", "b": second}, "second")),
        (Labels, Labels(LABELS)),
    ],
    ids=["tree", "function", "partial", "partial with a label", "callable tree"],
)
def test_labels_may_be_a_tree_or_a_function_also_if_it_is_a_callable_tree(wrap, labels):
    tx = make("group", param_labels=labels)
    params = wrap(PARAMS)
    state = jax.jit(tx.init)(params)
    assert set(state.rate.learning_rate) == {"first", "second"}
    _, state = jax.jit(tx.update)(wrap(GRADS[0]), state, params)
    _, state = jax.jit(tx.update)(wrap(GRADS[1]), state, params)
    np.testing.assert_allclose(get_learning_rate(state, group="first"), 0.05 + 0.01 * 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("granularity", "options"),
    [
        ("global", {}),
        ("group", {}),
        ("group", {"learning_rate": {"first": 0.1, "second": 0.2}}),
        ("group", {"learning_rate": {"first": 0.1, "second": 0.2}, "param_labels": lambda params: LABELS}),
        ("parameter", {}),
    ],
)
def test_map_params_distinguishes_parameters_and_other_numbers(granularity, options):
    tx = make(granularity, **options)
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda _: "params", state, transform_non_params=lambda _: "other")
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    expected = "params" if granularity == "parameter" else "other"
    assert set(jax.tree.leaves(mapped.rate)) == {expected}
    assert set(jax.tree.leaves((mapped.previous_update, mapped.inner_state))) == {"params"}


def test_map_params_with_a_label_function_treats_the_rates_as_one():
    tx = make("group", param_labels=lambda params: LABELS)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    mapped = optax.tree.map_params(tx, lambda _: "params", state, transform_non_params=lambda _: "other")
    assert mapped.rate.learning_rate == "other"  # a prefix of the state, as shardings may be


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_parameters_and_gradients_may_be_python_numbers(granularity):
    tx = make(granularity)
    state = tx.init({"a": 1.0, "b": 2.0})
    for _ in range(2):
        _, new_state = tx.update({"a": 1.0, "b": -0.5}, state, {"a": 1.0, "b": 2.0})
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
    arrays = make(granularity)
    expected = arrays.init({"a": jnp.ones(()), "b": jnp.full((), 2.0)})
    for _ in range(2):
        _, expected = arrays.update({"a": jnp.ones(()), "b": jnp.full((), -0.5)}, expected)
    chex.assert_trees_all_equal(state, expected)
