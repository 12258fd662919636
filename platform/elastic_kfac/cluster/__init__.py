"""Everything Ray: the embedded cluster, elastic training under Ray Train, what a person sees."""
