"""Every rule is compiled for TPU and GPU; what it adds to a train step there stays within a budget."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments.bench import accelerators, hlo, language_model, perceptron
from experiments.bench.accelerators import AXIS, BARE, RULES, TARGETS, WIDTHS
from tests.accelerators.budgets import BUDGETS, budget_of

TPU, GPU = "v5e", "h100"
DTYPES = ("float32", "bfloat16")
ADDED = [rule for rule in RULES if rule != BARE]
MAPPED = [rule for rule in ADDED if rule not in ("reduce_on_plateau", "hypergradient", "auto_lr")]
# Those that run by default; all others are slow. Every rule is compiled for one device and for several, and
# for both dtypes.
FAST = {(TPU, 1, "float32"), (TPU, 4, "bfloat16"), (TPU, 8, "float32"), (GPU, 1, "float32")}


def needs_compiler(target):
    reason = accelerators.missing_compiler(TARGETS[target])
    return [pytest.mark.accelerator, pytest.mark.skipif(reason is not None, reason=str(reason))]


def cases():
    return [
        pytest.param(
            rule,
            target,
            num_devices,
            dtype,
            id=f"{rule}-{target}-{num_devices}-{dtype}",
            marks=needs_compiler(target)
            + ([] if (target, num_devices, dtype) in FAST else [pytest.mark.slow]),
        )
        for rule in ADDED
        for target in (TPU, GPU)
        for num_devices in (1, 4, 8)
        for dtype in DTYPES
    ]


@functools.cache
def program(rule, target, num_devices, dtype):
    return accelerators.program_of(rule, TARGETS[target], num_devices, dtype=jnp.dtype(dtype))


def check_stays_on_the_device(got):
    assert got.host_operations == ()
    assert got.float64 == 0


@pytest.mark.parametrize(("rule", "target", "num_devices", "dtype"), cases())
def test_what_a_rule_adds_to_a_step(rule, target, num_devices, dtype):
    got, bare = program(rule, target, num_devices, dtype), program(BARE, target, num_devices, dtype)
    budget = budget_of(rule)
    check_stays_on_the_device(got)
    assert got.conditionals - bare.conditionals <= budget.conditionals
    assert got.loops - bare.loops <= budget.loops
    assert bare.all_reduces == (num_devices > 1)
    assert got.all_reduces - bare.all_reduces <= (budget.all_reduces if num_devices > 1 else 0)
    params, _, _ = accelerators.shapes_of(BARE, WIDTHS, jnp.dtype(dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
    budgeted_bytes = budget.tpu_bytes if target == TPU else budget.gpu_bytes
    assert (got.bytes - bare.bytes) / size <= budgeted_bytes[DTYPES.index(dtype)]
    if target == GPU:
        kernels, copies = budget.one_gpu if num_devices == 1 else budget.several_gpus
        assert got.kernels - bare.kernels <= kernels
        assert got.copies - bare.copies <= copies


@functools.cache
def mapped_program(rule, target):
    """The program of a step under shard_map on four devices, each of which sees its part of the batch."""
    mesh = accelerators.make_mesh(TARGETS[target], 4)
    tx = RULES[rule](axis_name=AXIS)
    step = jax.shard_map(
        accelerators.make_step(perceptron.loss, tx, axis_name=AXIS),
        mesh=mesh,
        in_specs=(P(), P(), P(AXIS)),
        out_specs=P(),
        check_vma=False,
    )
    return hlo.read_program(
        accelerators.compile_step(step, accelerators.shapes_of(rule, WIDTHS), mesh).as_text()
    )


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        pytest.param(
            rule,
            target,
            id=f"{rule}-{target}",
            marks=needs_compiler(target) + ([] if target == TPU else [pytest.mark.slow]),
        )
        for rule in MAPPED
        for target in (TPU, GPU)
    ],
)
def test_all_reduces_of_a_rule_with_an_axis_name(rule, target):
    got, bare = mapped_program(rule, target), mapped_program(BARE, target)
    check_stays_on_the_device(got)
    assert bare.all_reduces == 1  # of the gradients
    # Where a program has one all-reduce, it takes the mean loss along with the gradients.
    assert 0 <= got.all_reduces - bare.all_reduces <= budget_of(rule).mapped_all_reduces


@pytest.mark.parametrize(
    "target",
    [pytest.param("v6e", marks=needs_compiler("v6e")), pytest.param("b200", marks=needs_compiler("b200"))],
)
def test_other_generations(target):
    got, bare = (accelerators.program_of(rule, TARGETS[target]) for rule in ("greedy_lr", BARE))
    check_stays_on_the_device(got)
    assert got.conditionals == got.loops == 0
    assert got.bytes - bare.bytes < 0.01 * 4 * 256 * 512


def sharded_program(rule, target):
    """A transformer whose parameters, moments and batch are split over eight devices."""
    size = language_model.Size(vocabulary=64, length=32, width=64, layers=1, heads=2, batch=8)
    task = language_model.make_task(size)
    params = jax.eval_shape(task.init, jax.random.key(0))
    tx = RULES[rule]()
    shapes = (params, jax.eval_shape(tx.init, params), jax.eval_shape(lambda: task.train))
    specs = jax.tree.map(lambda leaf: P(AXIS) if leaf.ndim and leaf.shape[0] % 8 == 0 else P(), shapes[:2])
    step = accelerators.make_step(task.loss, tx)
    compiled = accelerators.compile_step(step, shapes, accelerators.make_mesh(TARGETS[target], 8), specs)
    return hlo.read_program(compiled.as_text())


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[*needs_compiler(target), *([] if target == TPU else [pytest.mark.slow])])
        for target in (TPU, GPU)
    ],
)
def test_a_fully_sharded_transformer(target):
    got, bare = sharded_program("greedy_lr", target), sharded_program(BARE, target)
    check_stays_on_the_device(got)
    assert got.all_reduces == bare.all_reduces
    assert got.conditionals == got.loops == 0
    assert got.bytes - bare.bytes < 0.02 * bare.bytes


@pytest.mark.parametrize("target", [pytest.param(TPU, marks=needs_compiler(TPU))])
def test_a_step_that_prints_is_detected(target):
    def step(params, state, batch):
        jax.debug.print("{}", params.sum())
        return params + batch.sum(), state, params.sum()

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    compiled = accelerators.compile_step(
        step, (square, square, square), accelerators.make_mesh(TARGETS[target], 1)
    )
    assert "send" in hlo.read_program(compiled.as_text()).host_operations


def test_all_rules_have_a_budget():
    assert list(BUDGETS) == ADDED
