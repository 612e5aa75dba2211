"""Every test process sees eight CPU devices, so that what shards can be tested.

Compiled programs are kept in pytest's cache folder, as compiling them takes four fifths of the suite's time;
``pytest --cache-clear`` forgets them.

JAX 0.10 takes several times longer to compile small fusions for CPUs than versions after it; with an older
way to emit them the suite takes half of the time. ``XLA_FLAGS= pytest`` does without.

Property-based tests draw the same examples each time, so that a red run means that the code has changed.
``pytest --hypothesis-profile=default --hypothesis-seed=N`` draws others.
"""

import os

import hypothesis
import jax

if jax.__version_info__ < (0, 11):  # later versions have no such flag
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    if hasattr(config, "cache"):  # not with "-p no:cacheprovider"
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
