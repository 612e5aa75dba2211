"""Counting operations in optimized programs: in a written one, and in programs compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments.bench import accelerators, hlo
from experiments.errors import UsageError

TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %double = f32[8,4]{1,0} add(%p, %p)
}

%branch (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%q), to_apply=%add
  ROOT %in_branch = f32[8,4]{1,0} fusion(%sum), kind=kLoop, calls=%fused
}

%called (r: f32[8,4]) -> f32[8,4] {
  %r = f32[8,4]{1,0} parameter(0)
  ROOT %in_call = f32[8,4]{1,0} fusion(%r), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[8,4], n: s32[]) -> (f32[8,4], s32[]) {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %n = s32[] parameter(1)
  %copy.1 = s32[] copy(%n)
  %fetch = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %fetched = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %kernel = (f32[8,4]{1,0}, bf16[2]{0}) fusion(%fetched, %copy.1), kind=kLoop, calls=%fused
  %part = f32[8,4]{1,0} get-tuple-element(%kernel), index=0
  %call.1 = f32[8,4]{1,0} call(%part), to_apply=%called
  %cond.1 = f32[8,4]{1,0} conditional(%n, %call.1, %call.1), branch_computations={%branch, %branch}
  %known = f32[8,4]{1,0} while(%cond.1), body=%branch, backend_config={"known_trip_count":{"n":"3"}}
  %loop = f32[8,4]{1,0} while(%known), body=%branch
  %wide = f64[] custom-call(%n), custom_call_target="xla_ffi_python_cpu_callback"
  ROOT %out = (f32[8,4]{1,0}, s32[]) tuple(%loop, %copy.1)
}
"""


def test_a_written_program():
    got = hlo.read_program(TEXT)
    assert got.kernels == 3  # the fusion, that of the called computation, and the custom call
    assert got.copies == 1
    assert got.conditionals == 1
    assert got.loops == 1
    assert got.all_reduces == 1
    assert got.float64 == 1
    assert got.host_operations == ("xla_ffi_python_cpu_callback",)
    array = 4 * 8 * 4
    # Transfer, fusion without its operand in another memory, called fusion, copy, custom call.
    assert got.bytes == array + (array + 2 * 2 + 4) + 2 * array + 2 * 4 + (8 + 4)


def compiled_for_the_cpu(function, *arguments):
    return hlo.read_program(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_callback_is_counted():
    def printing(x):
        jax.debug.print("{}", x)
        return x + 1

    assert len(compiled_for_the_cpu(printing, 1.0).host_operations) == 1
    assert compiled_for_the_cpu(lambda x: x + 1, 1.0).host_operations == ()


def test_float64_is_counted():
    with jax.enable_x64(True):
        assert compiled_for_the_cpu(lambda x: x + 1, jnp.ones(3, jnp.float64)).float64 > 0
        assert compiled_for_the_cpu(lambda x: x + 1, jnp.ones(3, jnp.float32)).float64 == 0


def test_control_flow_is_counted_once_and_not_entered():
    def step(x, go):
        x = jax.lax.while_loop(lambda y: y[0] < 9, lambda y: jnp.sin(y) + jnp.roll(y, 1), x)
        return jax.lax.cond(go, lambda: jnp.roll(x, 2) @ jnp.ones((1000, 1000)), lambda: x)

    got = compiled_for_the_cpu(step, jnp.ones(1000), True)
    assert (got.conditionals, got.loops) == (1, 1)
    assert got.bytes < 100 * 4 * 1000  # without the matrix


def test_data_parallel_steps_have_one_all_reduce():
    cpu = accelerators.TARGETS["cpu"]
    widths = (8, 16, 4)
    counts = {
        count: accelerators.program_of("bare", cpu, count, widths=widths).all_reduces for count in (1, 8)
    }
    assert counts[1] == 0 and counts[8] >= 1


def test_a_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    accelerators.make_mesh.cache_clear()
    with pytest.raises(UsageError, match=r'libtpu with pip install -e "\.\[tpu\]"'):
        accelerators.make_mesh(accelerators.TARGETS["v5e"], 1)
    with pytest.raises(UsageError, match=r"xla_cuda12 with pip install"):
        accelerators.make_mesh(accelerators.TARGETS["h100"], 1)


def test_steps_are_timed_on_a_device(monkeypatch):
    rules = {name: accelerators.RULES[name] for name in ("bare", "greedy_lr")}
    monkeypatch.setattr(accelerators, "RULES", rules)
    monkeypatch.setattr(accelerators, "_STEPS", 2)
    rows = accelerators.measured_rows(jax.devices()[0], repeats=2, widths=(8, 16, 4))
    assert [row.rule for row in rows] == ["bare", "greedy_lr"]
    assert all(row.step_seconds > 0 and row.compile_seconds > 0 for row in rows)
    assert rows[1].program.kernels > rows[0].program.kernels


def test_without_compilers_the_benchmark_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerators, "missing_compiler", lambda target: f"no compiler for {target.name}")
    console = Console(record=True, width=200)
    result = accelerators.run(console, tmp_path, repeats=1)
    text = console.export_text()
    assert "Skipped: no compiler for v5e" in text and "no GPU or TPU here" in text
    assert result["rows"] == [] and (tmp_path / "accelerators.json").exists()
