"""A linear map without bias whose inputs or outputs may span several axes, such as heads."""
import flax.linen as nn
import jax.numpy as jnp

from layers.array_types import Array, Float, typed


class Linear(nn.Module):
    """Contracts the last axes of x with the first axes of a kernel drawn from N(0, init_std^2).

    linen's DenseGeneral cannot initialise a kernel of many named axes under a mesh.

    Attributes:
      features: size of each output axis.
      logical_axes: names of all kernel axes, inputs first; `features` determines how many are inputs.
      init_std: initial standard deviation.
      dtype: dtype of the matmul and its result; the kernel itself is float32.
    """

    features: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        num_inputs = len(self.logical_axes) - len(self.features)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.logical_axes)
        kernel = self.param("kernel", init, (*x.shape[-num_inputs:], *self.features))
        return jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=num_inputs)
