"""Settings of all tests.

* Every test process has eight CPU devices, so that sharding can be tested. JAX uses no other device, unless
  ``JAX_PLATFORMS`` is set; the compilers for TPU and GPU in ``tests/accelerators`` need none.
* Compiled programs are cached in pytest's cache folder, since compiling them takes 80% of the suite's time;
  ``pytest --cache-clear`` deletes them.
* Compiler optimizations are disabled, since most programs are small and run once; this reduces the suite's
  time by a quarter. JAX 0.10 uses its older CPU emitters, since its new ones compile small fusions several
  times slower than those of later versions. ``XLA_FLAGS= pytest`` tests with the default compiler settings.
* Property-based tests draw the same examples each time, so a failure means that the code has changed.
  ``pytest --hypothesis-profile=default --hypothesis-seed=N`` draws others.
"""

import os

import hypothesis
import jax

flags = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later versions have no such flag
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    # No test has a rule where it has no effect, unless it is about that.
    config.addinivalue_line("filterwarnings", "error::greedylr_jax.MisplacedRuleWarning")
    if hasattr(config, "cache"):  # not with "-p no:cacheprovider"
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
