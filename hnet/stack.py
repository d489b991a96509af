"""A stack of residual blocks at one width: what an encoder, a decoder or the main network is."""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.layout import has_feed_forward, mixer_of, parse_layout
from hnet.mixers import empty_mixer_state, make_mixer
from hnet.stack_config import StackConfig
from layers import RMSNorm, SwiGLU
from layers.array_types import Array, Float, Int, typed

MixerState = Any   # a pytree: a cache of keys and values, or whatever a recurrence carries
MixerUpdate = Any  # what a mixer makes of its state; `hnet.decode_state.advance` applies it


class Block(nn.Module):
    """norm, mixer, and for names with a capital norm, feed-forward; the next norm adds sums up, in float32.

    Attributes:
      layer: a name in a layout: one of `hnet.layout.MIXERS`, with a capital for a feed-forward network.
      out_init_std: of the projections that write to the residual stream.
    """

    layer: str
    config: StackConfig
    out_init_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], segment_ids: jax.Array, state: MixerState | None
    ) -> tuple[tuple[jax.Array, jax.Array], MixerUpdate | None]:
        """((last output, residual), segments, state) -> ((output, residual), update), for `nn.scan`.

        Output and residual are [b, t, d]. Without a state to go on from, none is returned.
        """
        h, residual = carry
        residual = residual + h
        mixer = make_mixer(mixer_of(self.layer), self.config, self.out_init_std, self.dtype, name="mixer")
        h, after = mixer(self._norm("mixer_norm")(residual).astype(self.dtype), segment_ids, state)
        if has_feed_forward(self.layer):
            residual = residual + h
            feed_forward = SwiGLU(
                self.config.feed_forward_width, out_init_std=self.out_init_std, dtype=self.dtype,
                name="feed_forward")
            h = feed_forward(self._norm("feed_forward_norm")(residual).astype(self.dtype))
        return (h.astype(residual.dtype), residual), None if state is None else after

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(epsilon=self.config.norm_epsilon, name=name)


class Stack(nn.Module):
    """Runs of equal blocks, then one norm. Each run is compiled once and scanned over its layers.

    Attributes:
      layout: names and counts of the runs, outermost layer first; parameters of run i are stacked in `run{i}`.
      out_init_std: see `Block`.
    """

    layout: str
    config: StackConfig
    out_init_std: float
    dtype: jnp.dtype

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"],
        state: tuple[MixerState, ...] | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[MixerUpdate, ...] | None]:
        """Returns the output, and the update of each run's state (stacked over layers) if it was given one."""
        self.config.check_layouts(self.layout)
        # The residual stream is float32 whatever the compute dtype.
        h = x.astype(jnp.float32)
        carry = (h, jnp.zeros_like(h))
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_MAY_STORE[self.config.remat])
        after = []
        for index, (layer, count) in enumerate(parse_layout(self.layout)):
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast, 0),
                length=count, metadata_params={nn.PARTITION_NAME: "layers"})
            carry, run_state = layers(layer, self.config, self.out_init_std, self.dtype, name=f"run{index}")(
                carry, segment_ids, None if state is None else state[index])
            after.append(run_state)
        h, residual = carry
        y = RMSNorm(epsilon=self.config.norm_epsilon, name="final_norm")(h + residual).astype(self.dtype)
        return y, None if state is None else tuple(after)


# What a rematerialised block may still store for the backward pass.
_MAY_STORE = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


def empty_state(
    layout: str, config: StackConfig, batch: int, max_length: int, dtype: jnp.dtype
) -> tuple[MixerState, ...]:
    """Returns the state of a `Stack` before the first token; attention holds up to `max_length` tokens a row."""
    def of_run(layer: str, count: int) -> MixerState:
        state = empty_mixer_state(mixer_of(layer), config, batch, max_length, dtype)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), state)

    return tuple(of_run(*run) for run in parse_layout(layout))
