"""The mathematics of diffusion and flow matching: pure functions of arrays."""
