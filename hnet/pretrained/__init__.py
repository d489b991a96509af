"""Released weights under our parameter names.

  hnet_release    the official H-Net checkpoints, both ways
  release_config  their config files, both ways
"""
