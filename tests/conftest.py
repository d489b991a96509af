"""Eight virtual CPU devices for every test, so that sharded code is tested on any machine."""
import jax

jax.config.update("jax_num_cpu_devices", 8)
