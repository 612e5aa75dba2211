"""Several devices and several processes decide as one device does."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.greedylr_jax import training

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected():
    params, scales = training.single_device_run()
    assert len(set(scales)) > 3  # the rate moves, so agreement means something
    return params, scales


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def assert_same(got, expected):
    assert got[1] == expected[1]
    assert got[0].keys() == expected[0].keys()
    for name, leaf in got[0].items():
        np.testing.assert_allclose(leaf, expected[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharded_params", [False, True], ids=["data parallel", "fully sharded"])
def test_jit_with_named_sharding(expected, mesh, sharded_params):
    tx = training.optimizer()
    specs = {"hidden": P(None, "data"), "out": P("data")} if sharded_params else {"hidden": P(), "out": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(training.init_params(), shardings)
    state = jax.jit(tx.init)(params)
    x, y = training.data()
    x = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
    y = jax.device_put(y, NamedSharding(mesh, P(None, "data")))
    got = training.train(jax.jit(training.make_step(tx)), params, state, x, y)
    if sharded_params:
        assert len(got[0]["hidden"].sharding.device_set) == 8
        assert not got[0]["hidden"].sharding.is_fully_replicated
    assert_same(got, expected)


def test_shard_map_with_an_axis_name(expected, mesh):
    tx = training.optimizer(axis_name="data")
    # Inside, gradients and loss are those of one device's part of the batch.
    step = training.make_step(tx, average=functools.partial(jax.lax.pmean, axis_name="data"))
    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=(P(), P(), P()),
            check_vma=False,
        )
    )
    params = training.init_params()
    assert_same(training.train(mapped, params, tx.init(params), *training.data()), expected)


def test_without_an_axis_name_devices_would_disagree(mesh):
    """What axis_name is for: each device alone sees another loss, and takes another rate."""
    tx = training.optimizer()

    def run(x, y):
        params = training.init_params()
        step = training.make_step(tx, average=functools.partial(jax.lax.pmean, axis_name="data"))

        def body(carry, batch):
            params, state, scale = step(*carry, *batch)
            return (params, state), scale

        return jax.lax.scan(body, (params, tx.init(params)), (x, y))[1][None]

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(None, "data"), P(None, "data")), out_specs=P("data"), check_vma=False
    )
    scales = np.asarray(jax.jit(mapped)(*training.data()))
    assert scales.shape == (8, training.STEPS)
    assert len({tuple(row) for row in scales}) > 1


WORKER = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.greedylr_jax import training

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

def place(array, sharding):  # every process gives the part of the array that its devices hold
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

tx = training.optimizer()
params = jax.tree.map(lambda leaf: place(leaf, replicated), training.init_params())
state = jax.jit(tx.init, out_shardings=replicated)(params)
step = jax.jit(training.make_step(tx))
x, y = training.data()
x, y = [place(batch, split) for batch in x], [place(batch, split) for batch in y]
params, scales = training.train(step, params, state, x, y)
assert len(params["out"].sharding.device_set) == 4 and jax.process_count() == 2
print(json.dumps({"scales": scales, "out": np.asarray(params["out"].addressable_data(0)).tolist()}))
"""


@pytest.mark.slow
def test_two_processes_hold_identical_rates(expected, tmp_path):
    """Real processes, joined over the loopback interface with the gloo collectives of jaxlib."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"worker{rank}.log").open("w"),
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    logs = [(tmp_path / f"worker{rank}.log").read_text() for rank in range(2)]
    assert [worker.returncode for worker in workers] == [0, 0], logs
    first, second = (json.loads(text.splitlines()[-1]) for text in printed)  # gloo prints, too
    assert first == second
    assert first["scales"] == expected[1]
    np.testing.assert_allclose(first["out"], expected[0]["out"], rtol=1e-4, atol=1e-5)
