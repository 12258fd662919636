"""Before and after a run: feasibility, evaluation, audit, export, analysis of checkpoints."""
