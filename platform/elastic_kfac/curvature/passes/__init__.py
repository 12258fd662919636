"""Which passes a gradient is made of, and what they were about."""
