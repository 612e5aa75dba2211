"""Every test process sees eight CPU devices, so that what shards can be tested.

Compiled programs are kept in pytest's cache folder, as compiling them takes four fifths of the suite's time;
``pytest --cache-clear`` forgets them.

What is compiled is mostly small and runs once, so the compiler does not optimize it, which takes a quarter
off the suite's time; and JAX 0.10 takes several times longer to compile small fusions for CPUs than versions
after it, so that it emits them in an older way. ``XLA_FLAGS= pytest`` tests what users' compilers make.

Property-based tests draw the same examples each time, so that a red run means that the code has changed.
``pytest --hypothesis-profile=default --hypothesis-seed=N`` draws others.
"""

import os

import hypothesis
import jax

flags = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later versions have no such flag
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    if hasattr(config, "cache"):  # not with "-p no:cacheprovider"
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
