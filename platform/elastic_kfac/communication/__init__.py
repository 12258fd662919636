"""Collectives as a user of torch.distributed: counted, packed, bucketed, compressed."""
