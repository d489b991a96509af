"""The protocol of mixers: modules that mix tokens over time, and read a sequence at once or in parts.

  y, update = mixer(x, segment_ids, state)     x, y [b, t, d]; segment_ids [b, t], 0 = padding; None: one segment
  state = mixer.apply_update(state, update)

The state is None, or that of the tokens before, which are of the first segment in each row of the call; later
segments of a row start from nothing, and a row of padding leaves its state as it is. An update may be less than a
state, so that a stack of layers need not copy large states that are hardly changed: it applies the updates of all
layers at once, outside its scan.

Two doors of a stack are open to mixers that name them in `doors`:

  "layer_input"   the mixer takes a keyword `layer_input`: this layer's part of what the stack was given, or None
  "shared"        the mixer takes a keyword `shared`, a pytree that layers hand upwards, and returns
                  (y, update, shared), with the same structure
"""
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Bool, Int

Door = Literal["layer_input", "shared"]
State = Any   # a pytree of arrays whose first axis is the batch
Update = Any  # the same


class Mixer(nn.Module):
    """A module with the methods that a mixer has besides `__call__`.

    Those written here fit a mixer that returns its whole new state as the update, as recurrences do: such a mixer
    writes `empty_state` alone. None of them has parameters; they are called on a module that is not bound.
    """

    doors: ClassVar[frozenset[Door]] = frozenset()

    def empty_state(self, batch: int, width: int, max_length: int) -> State:
        """Makes the state before the first token.

        Args:
          width: model width.
          max_length: tokens of a segment that a state must have room for, if its size depends on that.
        """
        raise NotImplementedError(f"{type(self).__name__} must define empty_state(batch, width, max_length)")

    def empty_update(self, state: State) -> Update:
        """Makes the update of a call in which every row is one padding token."""
        return state

    def apply_update(self, state: State, update: Update) -> State:
        """Returns the state after the tokens that made `update`."""
        return update

    def restart(self, state: State, is_new: Bool[Array, "b"], width: int) -> State:
        """Returns the state with the rows `is_new`, in which another segment begins, as before the first token."""
        empty = self.empty_state(is_new.shape[0], width, 1)
        return jax.tree.map(lambda old, new: jnp.where(_expand(is_new, old.ndim), new, old), state, empty)

    def keep_scores(self, state: State) -> Array | None:
        """Rates the tokens that the state holds, [b, p, s]; None if it holds no tokens."""
        return None

    def compress(self, state: State, budget: int | Int[Array, "..."]) -> State:
        """Returns the state with at most `budget` tokens, if it holds tokens."""
        return state


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))
