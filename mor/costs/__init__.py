"""What a model costs: FLOPs, parameters, bytes."""
