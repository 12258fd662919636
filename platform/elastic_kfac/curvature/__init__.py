"""The mathematics of curvature: capture, factors, inverses, preconditioning, damping. Torch only."""
