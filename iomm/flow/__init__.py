"""Flow matching: path, timesteps, loss, samplers. Pure functions of tensors."""
