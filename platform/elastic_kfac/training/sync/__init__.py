"""How the ranks of a run keep one model: global sums, the canonical tree, local steps and their merge."""
