"""The matrix memory of xLSTM between projections."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.array_types import Array, Float, Int, typed
from layers.mixers.mixer import Mixer
from layers.mixers.parts import num_heads_for
from layers.nn.linear import Linear
from layers.nn.norms import rms_norm
from layers.recurrences.matrix import MatrixImplementation
from layers.recurrences.mlstm import InputActivation, MLSTMMemory, empty_memory, mlstm


class MLSTM(Mixer):
    """`mlstm` between projections, with a norm per head and an output gate, as in xLSTM 7B (arXiv 2503.13427).

    Attributes:
      state_size: k, the key dimension of the memory.
      expand: inner width over model width.
      head_width: v; inner width / head_width heads.
      gate_cap: soft bound on the magnitude of the input and forget gates before their activations.
      input_gate_bias: initial bias. At -10 a memory needs hundreds of tokens to rise above the floor of its
        normaliser, exp(-m); for short sequences 0 is better.
      init_std, out_init_std: initial standard deviations of the input and output projections.
    """

    state_size: int = 64
    expand: int = 1
    head_width: int = 64
    gate_cap: float = 15.0
    input_activation: InputActivation = "exp"
    input_gate_bias: float = -10.0
    init_std: float = 0.02
    out_init_std: float = 0.02
    implementation: MatrixImplementation = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: MLSTMMemory | None = None,
    ) -> tuple[Float[Array, "b t d"], MLSTMMemory]:
        """Returns the layer's output, 0 at padding, and the memory after the last real token of each row.

        Raises:
          ValueError: expand * d is not a multiple of head_width.
        """
        width = x.shape[-1]
        num_heads = num_heads_for(width, self.expand, self.head_width)

        def project(features, name, *axes):
            return Linear(features, ("embed", *axes), init_std=self.init_std, dtype=self.dtype, name=name)(x)

        def gate(name, bias_init):
            bias = self.param(f"{name}_bias", nn.with_logical_partitioning(bias_init, ("heads",)), (num_heads,))
            raw = project((num_heads,), name, "heads").astype(jnp.float32) + bias
            return self.gate_cap * jnp.tanh(raw / self.gate_cap)

        per_head = (num_heads, self.head_width)
        q = project((num_heads, self.state_size), "q_proj", "heads", None)
        k = project((num_heads, self.state_size), "k_proj", "heads", None)
        v = project(per_head, "v_proj", "heads", None)
        input_gate = gate("input_gate", nn.initializers.constant(self.input_gate_bias))
        # Memory lengths differ from head to head.
        forget_gate = gate("forget_gate", lambda *_: jnp.linspace(3.0, 6.0, num_heads))
        h, memory = mlstm(
            q, k, v, input_gate, forget_gate, input_activation=self.input_activation, initial_state=state,
            segment_ids=segment_ids, implementation=self.implementation)
        scale = self.param(
            "norm_scale", nn.with_logical_partitioning(nn.initializers.ones, ("heads", None)), per_head)
        h = rms_norm(h, jnp.ones(self.head_width), epsilon=1e-6) * scale.astype(self.dtype)
        h = h * jax.nn.sigmoid(project(per_head, "output_gate", "heads", None))
        y = Linear((width,), ("heads", None, "embed"), init_std=self.out_init_std, dtype=self.dtype, name="out")(h)
        return y, memory

    def empty_state(self, batch: int, width: int, max_length: int = 0) -> MLSTMMemory:
        """The memory before the first token, at this model width."""
        num_heads = num_heads_for(width, self.expand, self.head_width)
        return empty_memory(batch, num_heads, self.state_size, self.head_width)
