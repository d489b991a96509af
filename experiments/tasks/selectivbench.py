"""Strings of a random grammar whose states must be tracked, after SelectivBench (arXiv 2601.12598).

The alphabet has `num_symbols` ambiguous symbols and '#', the end of a string. Each ambiguous symbol stands for one
of `depth` states, its copies; '#' is a state of its own. In a state each symbol is allowed with probability
`density` and leads to one of its copies, drawn once per grammar: the state and the next symbol determine the next
state. The symbols allowed in a state follow with equal probability, and after '#' a new string starts with one of
four symbols. Every state therefore forbids some symbols, and these can serve as distractors.

A symbol is one step, a one-hot vector, followed by steps of zeros, its gap. A distractor is one more step, after
the gap, with a symbol that the state forbids; it leaves the state unchanged. The target is asked at every step
until the next symbol, and these steps are answered together.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.examples import Examples

NUM_START_STATES = 4
_MOST_DRAWS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Tables over the states.

    '#' is symbol 0 and state 0; symbol s has the states 1 + (s - 1) depth to s depth. Rows are padded on the right
    with their first entry.
    """

    symbol: np.ndarray          # [states] the symbol of a state
    successors: np.ndarray      # [states, most] the states that may follow
    num_successors: np.ndarray  # [states] at least 1
    forbidden: np.ndarray       # [states, most] the symbols that may not follow
    num_forbidden: np.ndarray   # [states] at least 1

    @property
    def num_states(self) -> int:
        return len(self.symbol)

    @property
    def num_symbols(self) -> int:
        """Number of symbols, '#' included."""
        return int(self.symbol[-1]) + 1

    @property
    def entropy(self) -> float:
        """Topological entropy in nats per symbol: the logarithm of the growth of the number of strings."""
        allowed = np.zeros((self.num_states, self.num_states))
        allowed[np.arange(self.num_states)[:, None], self.successors] = 1
        return math.log(np.abs(np.linalg.eigvals(allowed)).max())


def make_grammar(seed: int, num_symbols: int, depth: int, density: float) -> Grammar:
    """Draws the grammar of a seed; one in which some state never reaches '#' is drawn again.

    Raises:
      ValueError: the numbers admit no such grammar, or it is too rare to be found.
    """
    if num_symbols < NUM_START_STATES or depth < 1 or not 0 < density < 1:
        raise ValueError(
            f"num_symbols {num_symbols} must be at least {NUM_START_STATES}, depth {depth} at least 1, and "
            f"density {density} above 0 and below 1")
    rng = np.random.default_rng([seed, num_symbols, depth])
    symbol = np.concatenate([[0], np.repeat(np.arange(1, num_symbols + 1), depth)])
    for _ in range(_MOST_DRAWS):
        is_allowed = _draw_allowed(rng, len(symbol), num_symbols + 1, density)
        copies = 1 + np.arange(num_symbols) * depth + rng.integers(depth, size=(len(symbol), num_symbols))
        next_state = np.concatenate([np.zeros((len(symbol), 1), int), copies], axis=1)  # [states, symbols]
        if _all_reach_end(next_state, is_allowed):
            successors = [row[mask] for row, mask in zip(next_state, is_allowed, strict=True)]
            forbidden = [np.flatnonzero(~mask) for mask in is_allowed]
            return Grammar(symbol.astype(np.int32), *_padded(successors), *_padded(forbidden))
    raise ValueError(
        f"none of {_MOST_DRAWS} grammars of {num_symbols} symbols, depth {depth} and density {density} reaches "
        "'#' from every state; increase density or reduce depth")


def _draw_allowed(rng: np.random.Generator, num_states: int, num_symbols: int, density: float) -> np.ndarray:
    """Draws a mask [states, symbols]; states that allow no symbol or all of them are drawn again."""
    is_allowed = rng.random((num_states, num_symbols)) < density
    while (redraw := np.isin(is_allowed.sum(axis=1), (0, num_symbols))).any():
        is_allowed[redraw] = rng.random((redraw.sum(), num_symbols)) < density
    is_allowed[0] = False
    is_allowed[0, 1 + rng.permutation(num_symbols - 1)[:NUM_START_STATES]] = True
    return is_allowed


def _all_reach_end(next_state: np.ndarray, is_allowed: np.ndarray) -> bool:
    reaches, num_before = np.arange(len(next_state)) == 0, 0
    while reaches.sum() > num_before:
        num_before = reaches.sum()
        reaches = reaches | (reaches[next_state] & is_allowed).any(axis=1)
    return bool(reaches.all())


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.array([np.pad(row, (0, lengths.max() - len(row)), constant_values=row[0]) for row in rows])
    return padded.astype(np.int32), lengths


@dataclasses.dataclass(frozen=True)
class SelectivBench:
    """Strings of a grammar, one after the other, cut after `num_shown` symbols and padded to one length."""

    grammar: Grammar
    num_shown: int                # symbols of a sequence
    gaps: tuple[int, int]         # fewest and most steps of zeros after a symbol
    noise: float = 0.0            # amplitude of uniform noise on all inputs
    distractor_probability: float = 0.0  # that one follows a symbol
    first_distractor: int = 0     # the first symbol that may be followed by one
    target: str = "state"         # state: that of the last symbol | next_symbol: the symbol that follows

    @property
    def length(self) -> int:
        """Number of steps of the longest sequence."""
        num_distractors = self.num_shown - self.first_distractor if self.distractor_probability else 0
        return self.num_shown * (1 + self.gaps[1]) + max(num_distractors, 0)

    def sample(self, key: jax.Array) -> Examples:
        rng_walk, rng_gaps, rng_distractors, rng_noise = jax.random.split(key, 4)
        grammar, num_shown = self.grammar, self.num_shown
        states = walk(grammar, rng_walk, num_shown + 1)
        symbols = jnp.asarray(grammar.symbol)[states]
        labels = symbols[1:] if self.target == "next_symbol" else states[:-1]
        states, symbols = states[:-1], symbols[:-1]

        gaps = jax.random.randint(rng_gaps, (num_shown,), self.gaps[0], self.gaps[1] + 1)
        rng_presence, rng_choice = jax.random.split(rng_distractors)
        has_distractor = jax.random.uniform(rng_presence, (num_shown,)) < self.distractor_probability
        has_distractor &= jnp.arange(num_shown) >= self.first_distractor
        distractors = _pick(rng_choice, grammar.forbidden, grammar.num_forbidden, states)

        ends = jnp.cumsum(1 + gaps + has_distractor)  # [num_shown]
        step = jnp.arange(self.length)
        window = jnp.searchsorted(ends, step, side="right")
        is_real = window < num_shown
        window = jnp.minimum(window, num_shown - 1)
        since_symbol = step - (ends - 1 - gaps - has_distractor)[window]
        is_distractor = has_distractor[window] & (since_symbol == 1 + gaps[window])
        shown = jnp.where(since_symbol == 0, symbols[window], jnp.where(is_distractor, distractors[window], -1))
        inputs = jax.nn.one_hot(jnp.where(is_real, shown, -1), grammar.num_symbols)  # -1 gives zeros
        if self.noise:
            inputs += jax.random.uniform(rng_noise, inputs.shape, minval=-self.noise, maxval=self.noise)
        return Examples(
            inputs=inputs, segment_ids=is_real.astype(jnp.int32), labels=jnp.where(is_real, labels[window], -1),
            positions=None, windows=window)


def walk(grammar: Grammar, key: jax.Array, num_symbols: int) -> jax.Array:
    """Draws a walk through the grammar from the start of a string: [num_symbols] states in order."""
    def step(state, draw):
        choice = (draw * num_successors[state]).astype(jnp.int32)
        state = successors[state, jnp.minimum(choice, num_successors[state] - 1)]
        return state, state

    successors, num_successors = jnp.asarray(grammar.successors), jnp.asarray(grammar.num_successors)
    _, states = jax.lax.scan(step, jnp.int32(0), jax.random.uniform(key, (num_symbols,)))
    return states


def _pick(key: jax.Array, rows: np.ndarray, lengths: np.ndarray, states: jax.Array) -> jax.Array:
    """Draws one entry, all equally probable, from the row of each state."""
    length = jnp.asarray(lengths)[states]
    choice = jnp.minimum((jax.random.uniform(key, states.shape) * length).astype(jnp.int32), length - 1)
    return jnp.asarray(rows)[states, choice]
