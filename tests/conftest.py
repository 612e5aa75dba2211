"""Every test process sees eight CPU devices, so that what shards can be tested.

Property-based tests draw the same examples each time, so that a red run means that the code has changed.
``pytest --hypothesis-profile=default --hypothesis-seed=N`` draws others.
"""

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")
