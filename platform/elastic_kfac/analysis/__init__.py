"""Hessian products, eigenvalues, trace, density, loss landscape, probes."""
