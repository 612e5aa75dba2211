"""ARC's features: as published, and the same from a stream as from whole histories."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedylr_jax.arc import batch_features
from greedylr_jax.arc._features import FeatureStream, _nearest
from tests.reference_data import read_fixtures, reference_file

FIXTURES = read_fixtures("arc_features.json")


@pytest.mark.parametrize("index", range(len(FIXTURES)))
def test_features_are_the_published_ones_to_the_bit(index):
    case = FIXTURES[index]
    features = batch_features(case["train_loss"], case["val_loss"], case["lr"])
    np.testing.assert_array_equal(features[case["rows"]], np.array(case["features"], np.float32))


def test_all_reference_cases_agree_to_the_bit():
    lines = reference_file("arc/arc_preprocess.jsonl").read_text().splitlines()
    assert len(lines) == 40
    for line in lines:
        case = json.loads(line)
        features = batch_features(case["train_loss"], case["val_loss"], case["lr"])
        np.testing.assert_array_equal(features, np.array(case["features"], np.float32))


def test_what_lies_before_the_first_cycle_is_padding():
    features = batch_features([[1.0, 2.0, 4.0]], [[3.0, 5.0]], [0.1])
    np.testing.assert_array_equal(features[:200], np.tile(np.float32([0, 0, 1]), (200, 1)))
    assert features[200:, 0].std() > 0.5
    np.testing.assert_allclose(features[200:, 1], np.repeat([-1.0, 1.0], 50), atol=1e-6)


@pytest.mark.slow
def test_losses_whose_squares_overflow_are_standardized_as_smaller_ones_are():
    losses = np.random.default_rng(0).uniform(1, 2, 150).astype(np.float32)
    expected = batch_features([losses], [losses[:4]], [0.1])
    for power in (40, 60, 126):
        got = batch_features([losses * np.float32(2.0**power)], [losses[:4] * np.float32(2.0**power)], [0.1])
        np.testing.assert_array_equal(got, expected)
    stream = FeatureStream(150, 4)
    history = stream.init()
    for great in losses[:4] * np.float32(2.0**126):
        history = stream.add_validation(history, great)
    add = jax.jit(lambda history, item: (stream.add_loss(history, item[0], item[1]), None))
    history = jax.lax.scan(add, history, (jnp.arange(150), losses * np.float32(2.0**126)))[0]
    np.testing.assert_allclose(stream.features(history, jnp.int32(1)), expected, atol=1e-5)


def test_only_the_last_three_cycles_count():
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=20).tolist() for _ in range(5)]
    validation = [rng.normal(size=2).tolist() for _ in range(5)]
    rates = [0.1, 0.2, 0.4, 0.2, 0.8]
    whole = batch_features(losses, validation, rates)
    np.testing.assert_array_equal(whole, batch_features(losses[2:], validation[2:], rates[2:]))
    np.testing.assert_allclose(whole[:, 2], np.repeat([1.0, 0.5, 2.0], 100))


def test_the_index_of_a_nearest_neighbour_is_computed_in_double():
    """Its rounding is part of what was published: floor(i * n / D) but for a few rows."""
    for count, rows in ((14, 100), (22, 200), (21, 300)):
        exact = np.arange(rows) * count // rows
        assert 0 < (_nearest(count, rows) != exact).sum() <= 4
    for count in (1, 7, 30):
        np.testing.assert_array_equal(_nearest(count, 100), np.arange(100) * count // 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "at least one; got 0, 0 and 0"),
        (([[1.0]], [[1.0]], [0.1, 0.2]), "got 1, 1 and 2"),
        (([[1.0], []], [[], []], [0.1, 0.1]), "empty cycle"),
    ],
)
def test_histories_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_features(*arguments)


@functools.cache
def compiled(steps, max_validations):
    """A stream, and its features after cycles that are inputs; those beyond ``count`` are not entered."""
    stream = FeatureStream(steps, max_validations)

    @jax.jit
    def features(losses, validation, rates, count):
        def cycle(index, history):
            last_rate = rates[jnp.maximum(index - 1, 0)]
            history = stream.end_cycle(history, last_rate, is_end=index > 0)
            history = jax.lax.fori_loop(
                0, steps, lambda step, history: stream.add_loss(history, step, losses[index, step]), history
            )
            history = jax.lax.fori_loop(
                0,
                validation.shape[1],
                lambda place, history: stream.add_validation(history, validation[index, place]),
                history,
            )
            return history._replace(rates=history.rates.at[history.row].set(rates[index]))

        history = jax.lax.fori_loop(0, count, cycle, stream.init())
        return stream.features(history, jnp.minimum(count, 3))

    return features


def stream_of(steps, max_validations, losses, validation, rates):
    """The features after whole cycles were entered step by step; NaN stands for no validation loss."""
    count, most = len(losses), 5
    padded = np.zeros((most, steps), np.float32)
    padded[:count] = losses
    values = np.full((most, max_validations + 2), np.nan, np.float32)
    for index, cycle in enumerate(validation):
        values[index, : len(cycle)] = cycle
    ends = np.ones(most, np.float32)
    ends[:count] = rates
    return compiled(steps, max_validations)(padded, values, ends, jnp.int32(count))


@pytest.mark.parametrize("steps", [2, 3, 10, 99, 100, 101, 391, 3000])
def test_a_stream_gives_the_features_of_the_whole_history(steps):
    rng = np.random.default_rng(steps)
    assert len(FeatureStream(steps, 10)._used_steps) <= 3 * 2 * 100  # whatever the length of a cycle
    for cycles in (1, 2, 3, 5):
        losses = [(rng.normal(size=steps) + 3).astype(np.float32) for _ in range(cycles)]
        validation = [rng.uniform(size=rng.integers(0, 11)).astype(np.float32) for _ in range(cycles)]
        rates = rng.uniform(0.1, 2, size=cycles).astype(np.float32)
        expected = batch_features(losses, validation, rates)
        # Sums in another order: float32 rounding, and no more.
        np.testing.assert_allclose(stream_of(steps, 10, losses, validation, rates), expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda cycles: st.lists(
            st.lists(st.integers(-10, 10).map(float), max_size=4), min_size=cycles, max_size=cycles
        )
    )
)
def test_any_number_of_validation_losses_is_streamed(validation):
    losses = [[float(i), float(i + 1)] for i in range(len(validation))]
    rates = [1.0] * len(validation)
    got = stream_of(2, 4, losses, validation, rates)
    expected = batch_features(losses, validation, rates)
    np.testing.assert_allclose(got[:, 1], expected[:, 1], atol=1e-4)


def test_of_too_many_validation_losses_the_last_are_used():
    got = stream_of(2, 3, [[1.0, 2.0]], [[9.0, 1.0, 2.0, 3.0]], [1.0])
    np.testing.assert_allclose(got, batch_features([[1.0, 2.0]], [[1.0, 2.0, 3.0]], [1.0]), atol=1e-5)
