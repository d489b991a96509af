"""A stack of residual blocks at one width: what an encoder, a decoder or the main network is."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import StageConfig
from layers import Attention, Mamba2, RMSNorm, SwiGLU
from layers.array_types import Array, Float, Int, typed


class Block(nn.Module):
    """norm, mixer, and for capital letters norm, feed-forward; sums are added by the next norm, in float32.

    Attributes:
      letter: m or M = Mamba-2, t or T = attention; capitals carry a feed-forward network.
      out_init_std: of the projections that write to the residual stream.
    """

    letter: str
    stage: StageConfig
    out_init_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array], segment_ids: jax.Array):
        """(last output, residual), each [b, t, d] -> the same, for `nn.scan`."""
        h, residual = carry
        residual = residual + h
        h = self._mixer()(RMSNorm(name="mixer_norm")(residual).astype(self.dtype), segment_ids)
        if self.letter in "mM":
            h, _ = h  # the state is for decoding
        if self.letter in "MT":
            residual = residual + h
            feed_forward = SwiGLU(
                self.stage.feed_forward_width, out_init_std=self.out_init_std, dtype=self.dtype,
                name="feed_forward")
            h = feed_forward(RMSNorm(name="feed_forward_norm")(residual).astype(self.dtype))
        return (h.astype(residual.dtype), residual), None

    def _mixer(self) -> nn.Module:
        stage = self.stage
        if self.letter in "tT":
            return Attention(
                num_heads=stage.num_heads, rotary_width=stage.rotary_width, window=stage.window,
                out_init_std=self.out_init_std, dtype=self.dtype, name="mixer")
        return Mamba2(
            state_size=stage.ssm_state_size, expand=stage.ssm_expand, head_width=stage.ssm_head_width,
            conv_taps=stage.ssm_conv_taps, chunk_size=stage.ssm_chunk_size,
            out_init_std=self.out_init_std, dtype=self.dtype, name="mixer")


class Isotropic(nn.Module):
    """Runs of equal blocks, then one norm. Each run is compiled once and scanned over its layers.

    Attributes:
      runs: letter and count of each run, outermost layer first; parameters of run i are stacked in `run{i}`.
      out_init_std: see `Block`.
      remat: recompute each block in the backward pass.
    """

    runs: tuple[tuple[str, int], ...]
    stage: StageConfig
    out_init_std: float
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        # The residual stream is float32 whatever the compute dtype.
        h = x.astype(jnp.float32)
        carry = (h, jnp.zeros_like(h))
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        for index, (letter, count) in enumerate(self.runs):
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                length=count, metadata_params={nn.PARTITION_NAME: "layers"})
            carry, _ = layers(letter, self.stage, self.out_init_std, self.dtype, name=f"run{index}")(
                carry, segment_ids)
        h, residual = carry
        return RMSNorm(name="final_norm")(h + residual).astype(self.dtype)
