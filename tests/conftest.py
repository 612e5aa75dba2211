"""Every test process sees two CPU devices, as the experiments do on the smallest machine they aim at."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
