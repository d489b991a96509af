"""Causal depthwise convolution that stays within segments and returns a state to continue from."""
import flax.linen as nn
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.arrays.segments import segment_ordinals


@typed
def causal_depthwise_conv(
    x: Float[Array, "b t d"],
    kernel: Float[Array, "w d"],
    bias: Float[Array, "d"],
    *,
    initial_state: Float[Array, "b w-1 d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b w-1 d"]]:
    """Returns y_t = bias + sum_j kernel[j] * x_{t - w + 1 + j}, and the last w - 1 inputs.

    The last tap reads the current token. Sums are float32; y has the dtype of `x`. Taps that would reach into
    another segment or into padding read 0, and y is 0 at padding.

    Args:
      initial_state: the w - 1 inputs before the first token, oldest first; None means zeros.
      segment_ids: 0 = padding. The returned state is that after the last real token, and zero where its window
        reaches before the start of its segment.
    """
    taps, length = kernel.shape[0], x.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    is_real = segment_ids != 0
    ordinal = segment_ordinals(segment_ids)  # [b, t]

    x = jnp.where(is_real[:, :, None], x, 0)
    history = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))  # [b, w - 1 + t, d]
    if initial_state is not None:
        # Directly before the first real token, even if padding precedes that token.
        before = jnp.argmax(is_real, axis=1)[:, None] + jnp.arange(taps - 1)  # [b, w - 1]
        history = history.at[jnp.arange(x.shape[0])[:, None], before].set(initial_state.astype(x.dtype))
    history_ordinal = jnp.pad(ordinal, ((0, 0), (taps - 1, 0)), constant_values=1)
    y = jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
    for tap in range(taps):
        seen = (history_ordinal[:, tap : tap + length] == ordinal)[:, :, None]
        shifted = history[:, tap : tap + length].astype(jnp.float32)
        y = y + jnp.where(seen, shifted * kernel[tap].astype(jnp.float32), 0)
    y = jnp.where(is_real[:, :, None], y, 0).astype(x.dtype)

    num_read = jnp.max(jnp.where(is_real, jnp.arange(1, length + 1), 0), axis=1, initial=0)  # [b]
    window = num_read[:, None] + jnp.arange(taps - 1)  # [b, w - 1], into history
    state = jnp.take_along_axis(history, window[:, :, None], axis=1)
    own = jnp.take_along_axis(history_ordinal, window, axis=1) == jnp.max(ordinal, axis=1, keepdims=True)
    return y, jnp.where(own[:, :, None], state, 0)


class CausalDepthwiseConv(nn.Module):
    """`causal_depthwise_conv` with learned taps, initialised like torch's Conv1d: uniform in +-1/sqrt(taps)."""

    taps: int
    logical_axis: str = "conv"

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        initial_state: Float[Array, "b s d"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        bound = self.taps**-0.5
        width = x.shape[-1]

        def uniform(key, shape, dtype=jnp.float32):
            return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

        partitioned = nn.with_logical_partitioning
        kernel = self.param("kernel", partitioned(uniform, (None, self.logical_axis)), (self.taps, width))
        bias = self.param("bias", partitioned(uniform, (self.logical_axis,)), (width,))
        return causal_depthwise_conv(x, kernel, bias, initial_state=initial_state, segment_ids=segment_ids)
