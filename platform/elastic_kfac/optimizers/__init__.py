"""What a user instantiates: KFAC, sharded pipelines, large-batch rules and schedules."""
