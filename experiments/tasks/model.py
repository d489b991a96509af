"""The model of the synthetic tasks: embedding, one short convolution, a stack of layers, and a linear head."""
import math

import flax.linen as nn
import jax.numpy as jnp

from hnet import Stack, StackConfig, residual_depth
from layers import CausalDepthwiseConv
from layers.array_types import Array, Float, Int, typed


class TaskModel(nn.Module):
    """A stack of layers that answers questions about tokens, or about vectors.

    Attributes:
      layout: the layers, by the names of `hnet.layout.MIXERS`.
      input_size: tokens of the vocabulary, or features of a step.
      conv_taps: of the convolution, whose output is added to its input; 0 = none. It lets every mixer, attention
        too, see a key and its value as one.
    """

    layout: str
    stack: StackConfig
    input_size: int
    num_classes: int
    conv_taps: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        inputs: Int[Array, "b t"] | Float[Array, "b t v"],
        segment_ids: Int[Array, "b t"],
        positions: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n classes"]:
        """Returns float32 logits at `positions`, or at every step. Inputs are tokens, or vectors to be mapped."""
        width = self.stack.width
        embedding = self.param("embedding", nn.initializers.normal(1.0), (self.input_size, width))
        embedding = embedding.astype(self.dtype)
        x = embedding[inputs] if inputs.ndim == 2 else inputs.astype(self.dtype) @ embedding
        if self.conv_taps:
            x += CausalDepthwiseConv(self.conv_taps, name="conv")(x, segment_ids=segment_ids)[0]
        out_init_std = 0.02 / math.sqrt(residual_depth(self.layout))
        x, *_ = Stack(self.layout, self.stack, out_init_std, self.dtype, name="encoder")(x, segment_ids)
        if positions is not None:  # nothing is asked elsewhere, and logits over a large vocabulary are large
            x = jnp.take_along_axis(x, positions[..., None], axis=1)
        head = self.param("lm_head", nn.initializers.normal(0.02), (width, self.num_classes))
        return jnp.einsum("bnd,dv->bnv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
