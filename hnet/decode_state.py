"""What an H-Net remembers between tokens: one pytree, level within level, with its own length for every row."""
from typing import NamedTuple, Union

import jax
import jax.numpy as jnp

from hnet.config import HNetConfig
from hnet.isotropic import MixerState, empty_state
from layers import RouterState


class StageState(NamedTuple):
    """A stage and everything inside it. The fields past `encoder` are None at the innermost stage."""

    encoder: tuple[MixerState, ...]
    router: RouterState | None
    value: jax.Array | None            # [b, d] float32: what the chunk that each row is in contributes
    decoder: tuple[MixerState, ...] | None
    inner: Union["StageState", None]


def init_decode_state(config: HNetConfig, batch: int, max_length: int) -> StageState:
    """The state before the first token of `batch` rows.

    Args:
      max_length: tokens that a row may grow to; attention at every stage has room for as many.
    """
    def of_stage(index: int) -> StageState:
        stage, dtype = config.stages[index], config.compute_dtype
        encoder = empty_state(stage.encoder_runs, stage, batch, max_length, dtype)
        if not stage.decoder:
            return StageState(encoder, None, None, None, None)
        decoder = empty_state(stage.decoder_runs, stage, batch, max_length, dtype)
        value = jnp.zeros((batch, stage.width), jnp.float32)
        return StageState(encoder, RouterState.empty(batch, stage.width), value, decoder, of_stage(index + 1))

    return of_stage(0)
