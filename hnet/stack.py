"""A stack of residual blocks at one width: what an encoder, a decoder or the main network is."""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import StageConfig, has_feed_forward, mixer_of
from hnet.mixers import empty_mixer_state, make_mixer
from layers import RMSNorm, SwiGLU
from layers.array_types import Array, Float, Int, typed

MixerState = Any   # a pytree: a cache of keys and values, or whatever a recurrence carries
MixerUpdate = Any  # what a mixer makes of its state; `hnet.decode_state.advance` applies it


class Block(nn.Module):
    """norm, mixer, and for names with a capital norm, feed-forward; the next norm adds sums up, in float32.

    Attributes:
      layer: a name in a layout: one of `hnet.config.MIXERS`, with a capital for a feed-forward network.
      out_init_std: of the projections that write to the residual stream.
    """

    layer: str
    stage: StageConfig
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
        mixer = make_mixer(mixer_of(self.layer), self.stage, self.out_init_std, self.dtype, name="mixer")
        h, after = mixer(RMSNorm(name="mixer_norm")(residual).astype(self.dtype), segment_ids, state)
        if has_feed_forward(self.layer):
            residual = residual + h
            feed_forward = SwiGLU(
                self.stage.feed_forward_width, out_init_std=self.out_init_std, dtype=self.dtype,
                name="feed_forward")
            h = feed_forward(RMSNorm(name="feed_forward_norm")(residual).astype(self.dtype))
        return (h.astype(residual.dtype), residual), None if state is None else after


class Isotropic(nn.Module):
    """Runs of equal blocks, then one norm. Each run is compiled once and scanned over its layers.

    Attributes:
      runs: name and count of each run, outermost layer first; parameters of run i are stacked in `run{i}`.
      out_init_std: see `Block`.
    """

    runs: tuple[tuple[str, int], ...]
    stage: StageConfig
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
        # The residual stream is float32 whatever the compute dtype.
        h = x.astype(jnp.float32)
        carry = (h, jnp.zeros_like(h))
        block = Block
        if self.stage.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_MAY_STORE[self.stage.remat])
        after = []
        for index, (layer, count) in enumerate(self.runs):
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast, 0),
                length=count, metadata_params={nn.PARTITION_NAME: "layers"})
            carry, run_state = layers(layer, self.stage, self.out_init_std, self.dtype, name=f"run{index}")(
                carry, segment_ids, None if state is None else state[index])
            after.append(run_state)
        h, residual = carry
        y = RMSNorm(name="final_norm")(h + residual).astype(self.dtype)
        return y, None if state is None else tuple(after)


# What a rematerialised block may still store for the backward pass.
_MAY_STORE = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


def empty_state(
    runs: tuple[tuple[str, int], ...], stage: StageConfig, batch: int, max_length: int, dtype: jnp.dtype
) -> tuple[MixerState, ...]:
    """The state of an `Isotropic` before the first token; attention holds up to `max_length` tokens a row."""
    def of_run(layer: str, count: int) -> MixerState:
        state = empty_mixer_state(mixer_of(layer), stage, batch, max_length, dtype)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), state)

    return tuple(of_run(*run) for run in runs)
