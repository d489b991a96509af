"""One training step and its parts.

  step           loss, gradient, update, as one compiled program
  losses         nats per byte, the ratio loss
  optimizer      AdamW, its schedule, rates per stage
  mesh           devices, and which array axis is split over them
  step_problems  metrics that must stop training
"""
