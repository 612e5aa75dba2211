"""Every test process sees eight CPU devices, so that what shards can be tested."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
