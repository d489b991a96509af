"""A model reads a context into its decode state; what the state becomes is up to a pure function; then it answers.

  reader = ModelReader(config.model, params, length=2048, compress=lambda state: ...)
  state  = reader.read(context)                      # pieces of PIECE tokens, then `compress`
  nats, best = reader.answer(state, question, answer)  # any number of times, in one call each
"""
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.longcontext.examples import ROOM
from hnet import DecodeState, HNetConfig, HNetLM, init_decode_state, prefill

PIECE = 512  # tokens of a context that are read at once
QuestionPlace = Literal["outside", "inside"]
Compress = Callable[[DecodeState], DecodeState]


class Answered(NamedTuple):
    """Predictions of an answer that was read along."""

    nats: np.ndarray  # [a] float32: of each token of the answer, given those before it
    best: np.ndarray  # [a] int32: the most probable token in its place


class Reader(Protocol):
    """Anything that can be asked about a context.

    Attributes:
      compile_seconds: spent on compiling, in all.
    """

    compile_seconds: float

    def read(self, context: np.ndarray) -> Any:
        """Reads context ids [t] and returns what is kept of them."""

    def answer(self, state: Any, question: np.ndarray, answer: np.ndarray) -> Answered:
        """Reads question and answer ids from there, and leaves the state as it was."""

    def state_bytes(self, state: Any) -> int:
        """Counts the bytes that are kept of a context."""


class ModelReader:
    """An H-Net that reads contexts of `length - ROOM` tokens; a `Reader`."""

    def __init__(
        self, config: HNetConfig, params: Any, length: int, *, compress: Compress | None = None,
        question: QuestionPlace = "outside",
    ) -> None:
        """Compiles the programs, once for all contexts of this length.

        Args:
          length: of context, question and answer together.
          compress: a pure function from the state after the compressed part to the one that answers are read from;
            None = the state as it is.
          question: "outside" = a context is compressed before the question is read; "inside" = with the question,
            all of it but its last token, which predicts the first of the answer.
        """
        self._config = config.at_full_capacity()
        model, self._params, self._length, self._question = HNetLM(self._config), params, length, question
        compiled = [jax.jit(lambda *arguments: prefill(model, *arguments)[1], donate_argnums=donated)
                    for donated in ((3,), ())]
        before = time.perf_counter()
        state = jax.eval_shape(self._empty)
        self._read = _compile(compiled[0], params, PIECE, state)
        self._compress = None if compress is None else jax.jit(compress).lower(state).compile()
        self._extend = _compile(compiled[1], params, ROOM, state) if question == "inside" else None
        kept = state if compress is None else jax.eval_shape(compress, state)
        self._answer = _compile(jax.jit(lambda *arguments: _predict(model, *arguments)), params, ROOM, kept)
        self.compile_seconds = time.perf_counter() - before

    def read(self, context: np.ndarray) -> DecodeState:
        state = self._empty()
        for start in range(0, len(context), PIECE):
            state = self._read(self._params, *_padded(context[start : start + PIECE], PIECE), state)
        return jax.block_until_ready(state if self._question == "inside" else self._compressed(state))

    def answer(self, state: DecodeState, question: np.ndarray, answer: np.ndarray) -> Answered:
        if self._question == "inside":
            state = self._compressed(self._extend(self._params, *_padded(question[:-1], ROOM), state))
            question = question[-1:]
        nats, best = self._answer(self._params, *_padded(np.concatenate([question, answer]), ROOM), state)
        there = slice(len(question) - 1, len(question) + len(answer) - 1)
        return Answered(np.asarray(nats)[there], np.asarray(best)[there])

    def state_bytes(self, state: DecodeState) -> int:
        """Counts the bytes of a state, empty slots included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def _empty(self) -> DecodeState:
        return init_decode_state(self._config, 1, self._length)

    def _compressed(self, state: DecodeState) -> DecodeState:
        return state if self._compress is None else self._compress(state)


def _predict(
    model: HNetLM, params: Any, tokens: jax.Array, segment_ids: jax.Array, state: DecodeState
) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of each next token [t] and the most probable one; the last has none that follows."""
    logits = model.apply({"params": params}, tokens, segment_ids, state).logits[0]
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
        logits, jnp.roll(tokens[0], -1)[:, None], axis=-1)[:, 0]
    return nats, jnp.argmax(logits, axis=-1)


def _compile(function: Any, params: Any, size: int, state: Any) -> Any:
    ids = jax.ShapeDtypeStruct((1, size), jnp.int32)
    return function.lower(params, ids, ids, state).compile()


def _padded(ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segment ids, [1, size], padded on the right."""
    tokens, segment_ids = np.zeros((2, 1, size), np.int32)
    tokens[0, : len(ids)], segment_ids[0, : len(ids)] = ids, 1
    return tokens, segment_ids
