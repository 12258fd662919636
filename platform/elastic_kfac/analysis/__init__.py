"""What the Hessian says: products, eigenvalues, trace, density, landscape, probes."""
