"""A language model of one stage that reads a prompt and then decodes a batch, timed by its own clock."""
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.rivals.contest import Turn
from hnet import HNetConfig, HNetLM, init_decode_state, prefill, step
from hnet.generation import LARGEST_PIECE


class Stopwatch:
    """Seconds since it was made: on the clock, and on the processors by this process."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


class Decoder:
    """A model, its weights in its dtype, and the state of the batch that it decodes.

      decoder.prefill(prompt); decoder.repeat(8); decoder.decode(tokens)

    Attributes:
      config: the model; its dtype is also that of the weights.
    """

    def __init__(self, config: HNetConfig, params: Any, *, room: int) -> None:
        """Compiles nothing yet.

        Args:
          room: tokens that a row may grow to.
        """
        self.config, self._room = config, room
        self._params = jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)
        self._read = jax.jit(partial(prefill, HNetLM(config)), donate_argnums=3)
        self._next = jax.jit(partial(step, HNetLM(config)), donate_argnums=2)
        self._state: Any = None

    def prefill(self, tokens: np.ndarray) -> Turn:
        """Reads a prompt [1, t] from an empty state, in the pieces that `generate` makes."""
        self._state = None  # its memory is free before there is another
        state = jax.block_until_ready(init_decode_state(self.config, len(tokens), self._room))
        size = min(LARGEST_PIECE, tokens.shape[1])
        num_pieces = -(-tokens.shape[1] // size)
        padding = (0, 0), (0, num_pieces * size - tokens.shape[1])
        is_token = np.pad(np.ones_like(tokens), padding)
        tokens = np.pad(tokens, padding)
        start = Stopwatch()
        for piece in np.split(np.arange(tokens.shape[1]), num_pieces):
            logits, state = self._read(self._params, tokens[:, piece], is_token[:, piece], state)
        logits.block_until_ready()
        times = start.read()
        self._state = state
        return Turn(*times, np.asarray(logits))

    def repeat(self, rows: int) -> None:
        """Makes the state of one row that of many."""
        shapes = jax.eval_shape(lambda: init_decode_state(self.config, rows, self._room))
        one, self._state = self._state, None
        self._state = jax.block_until_ready(
            jax.tree.map(lambda leaf, many: jnp.broadcast_to(leaf, many.shape), one, shapes))

    def decode(self, tokens: np.ndarray) -> Turn:
        """Reads tokens [rows, steps] one step at a time, and continues from there at the next call."""
        state, self._state = self._state, None  # donated
        start = Stopwatch()
        for column in tokens.T:
            logits, state = self._next(self._params, column, state)
        logits.block_until_ready()
        times = start.read()
        self._state = state
        return Turn(*times, np.asarray(logits))
