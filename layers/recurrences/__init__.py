"""Recurrences as functions of arrays, one file each; `layers/mixers` has the modules around them.

  matrix/    S_t = decay S_{t-1} + k v^T and its kin: one op for all matrix states
  diagonal/  h_t = a_t h_{t-1} + x_t: one op for all vector states
  matrix states    gated_linear_attention, ssd, retention, linear_attention, mlstm, gated_delta_rule,
                   dplr_recurrence, gated_slot_attention, log_linear_attention, ttt_linear
  vector states    rg_lru, hgrn, min_gru, s4d, s5 (state_space discretises)
  shared           segment_states, context_parallel, log_decay, running_max
"""
