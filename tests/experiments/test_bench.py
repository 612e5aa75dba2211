"""The benchmarks of overhead and of peers, on sizes at which only their counts mean something."""

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import language_model, overhead, peers


def rows_of(*sides, network=overhead.NETWORKS["0.1M"]):
    """Compiled and counted; what a single turn takes says nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead, "SIDES", {side: overhead.SIDES[side] for side in (overhead.BARE, *sides)})
        return {row.side: row for row in overhead.network_rows("", network, 1)}


def check_that_it_adds_nothing(row):
    parameters = sum(a * b for a, b in zip((64, 256, 256), (256, 256, 10), strict=True))
    assert row.operations == 0
    # One product an element, in the loop that Adam's update is already.
    assert row.flops < 1.1 * parameters
    assert row.bytes < 0.1 * 4 * parameters


@pytest.fixture(scope="module")
def rows():
    return rows_of("greedy_lr", "hypergradient")


def test_greedy_lr_adds_no_operation_of_parameter_size(rows):
    check_that_it_adds_nothing(rows["greedy_lr"])


@pytest.mark.slow
def test_nor_do_the_other_rules_that_keep_no_parameters():
    sides = ("greedy_lr, window None", "greedy_lr, paper", "trend_lr")
    rows = rows_of(*sides)
    for side in sides:
        check_that_it_adds_nothing(rows[side])


def test_what_keeps_a_copy_of_the_parameters_shows_in_the_count(rows):
    assert rows["hypergradient"].operations > 0
    assert rows["bare"].operations == 0 and rows["bare"].time_ratio == 1


def test_nor_does_it_to_a_transformer_as_on_an_accelerator():
    size = language_model.Size(vocabulary=64, length=16, width=32, layers=1, heads=2, batch=2)
    rows = rows_of("greedy_lr", network=overhead.transformer(size, steps=1))
    assert rows["greedy_lr"].operations == 0 and rows["greedy_lr"].bytes < 1000


def test_that_transformer_has_as_many_parameters_as_the_smallest_gpt_2():
    params, batch = jax.eval_shape(overhead.transformer(language_model.Size(), steps=1).make)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 124_439_808
    assert batch["input"].shape == batch["label"].shape == (8, 1024)


def test_large_operations_are_counted_in_a_program():
    size = 1000
    small = jax.jit(lambda x: x[:10] * 2).lower(jnp.ones(size)).compile()
    one = jax.jit(lambda x: x * 2).lower(jnp.ones(size)).compile()
    two = jax.jit(lambda x: (jnp.sort(x), x * 2)).lower(jnp.ones(size)).compile()
    assert [overhead.large_operations(each.as_text(), size) for each in (small, one, two)] == [0, 1, 2]


def test_the_scanned_problem_has_all_sides(monkeypatch):
    monkeypatch.setattr(overhead, "SCAN_STEPS", 100)
    sides = {name: overhead.SIDES[name] for name in (overhead.BARE, "greedy_lr")}
    monkeypatch.setattr(overhead, "SIDES", sides)
    bare, ours = overhead.scan_rows(1)
    assert bare.time_ratio == 1 and ours.time_ratio > 0 and ours.side == "greedy_lr"


def test_decisions_of_one_rule_and_of_many_are_the_same(monkeypatch):
    monkeypatch.setattr(peers, "RULES", 4)  # whose losses are multiplied by 0.5, 1, 1.5 and 2
    for window in (50, None):
        alone, many = peers._scanned(window, 200)()[1], peers._mapped(window, 200)()
        assert many.shape == (4,) and alone.shape == (200,)
        assert many[1] == alone[-1] != alone[0]


def test_a_step_that_leaves_the_device_is_seen():
    peers.check_that_it_stays_on_device()
    with pytest.raises(Exception, match="Disallowed host-to-device"), jax.transfer_guard("disallow"):
        jax.jit(lambda x: x + 1)(1.0)
