"""A stack of residual blocks at one width: an encoder, a decoder, the main network, or a model without chunks."""
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.layout import has_feed_forward, mixer_of, parse_layout
from hnet.mixers import make_mixer
from hnet.stack_config import StackConfig
from hnet.stack_state import StackState
from layers import RMSNorm, SwiGLU, carried_segment, last_segment
from layers.array_types import Array, Float, Int, typed


class StackOutput(NamedTuple):
    """The result of a `Stack`."""

    y: jax.Array                # [b, t, d]
    update: StackState | None   # for `apply_updates`; None without a state
    shared: Any                 # the pytree that the layers handed upwards


class Carry(NamedTuple):
    """The values that go from block to block."""

    h: jax.Array         # [b, t, d] float32: output of the last block
    residual: jax.Array  # [b, t, d] float32: sum of those before
    shared: Any


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
        self, carry: Carry, segment_ids: jax.Array, is_new: jax.Array | None, state: Any, layer_input: Any
    ) -> tuple[Carry, Any]:
        """Returns the carry for the next block and the update of the mixer's state, for `nn.scan`.

        Args:
          is_new: [b] bool: rows that begin another segment than the one their state is of; None without a state.
        """
        h, residual, shared = carry
        residual = residual + h
        mixer = make_mixer(mixer_of(self.layer), self.config, self.out_init_std, self.dtype, name="mixer")
        x = self._norm("mixer_norm")(residual).astype(self.dtype)
        if state is not None:
            state = mixer.restart(state, is_new, x.shape[-1])
        doors = {"layer_input": layer_input} if "layer_input" in mixer.doors else {}
        if "shared" in mixer.doors:
            h, update, shared = mixer(x, segment_ids, state, shared=shared, **doors)
        else:
            h, update = mixer(x, segment_ids, state, **doors)
        if has_feed_forward(self.layer):
            residual = residual + h
            feed_forward = SwiGLU(
                self.config.feed_forward_width, out_init_std=self.out_init_std, dtype=self.dtype,
                name="feed_forward")
            h = feed_forward(self._norm("feed_forward_norm")(residual).astype(self.dtype))
        return Carry(h.astype(residual.dtype), residual, shared), None if state is None else update

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
        state: StackState | None = None,
        *,
        layer_inputs: tuple[Any, ...] | None = None,
        shared: Any = None,
    ) -> StackOutput:
        """Runs all layers.

        Args:
          state: from `empty_state` or `apply_updates`; a row continues if its first segment is the one that it
            was in, and otherwise starts anew.
          layer_inputs: for every run None or a pytree of arrays [layers of the run, ...], such as roles of heads;
            each layer's mixer gets its part, if it has that door.
          shared: a pytree that mixers with that door read and return, from the first layer to the last.
        """
        self.config.check_layouts(self.layout)
        runs = parse_layout(self.layout)
        if layer_inputs is not None and len(layer_inputs) != len(runs):
            raise ValueError(f"layer_inputs has {len(layer_inputs)} entries; the {len(runs)} runs of layout "
                             f"{self.layout!r} need one each")
        is_new, segment = None, None
        if state is not None:
            carried = carried_segment(segment_ids, state.segment)
            is_new = jnp.any(segment_ids != 0, axis=1) & (carried == 0)
            segment = last_segment(segment_ids, state.segment)
        # The residual stream is float32 whatever the compute dtype.
        h = x.astype(jnp.float32)
        carry = Carry(h, jnp.zeros_like(h), shared)
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_MAY_STORE[self.config.remat])
        updates = []
        for index, (layer, count) in enumerate(runs):
            layers = nn.scan(
                block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, 0), length=count,
                metadata_params={nn.PARTITION_NAME: "layers"})
            carry, update = layers(layer, self.config, self.out_init_std, self.dtype, name=f"run{index}")(
                carry, segment_ids, is_new, None if state is None else state.runs[index],
                None if layer_inputs is None else layer_inputs[index])
            updates.append(update)
        y = RMSNorm(epsilon=self.config.norm_epsilon, name="final_norm")(carry.h + carry.residual)
        update = None if state is None else StackState(segment, tuple(updates))
        return StackOutput(y.astype(self.dtype), update, carry.shared)


# What a rematerialised block may still store for the backward pass.
_MAY_STORE = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}
