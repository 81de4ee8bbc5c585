"""The engine: owns the model, its activations and its KV cache. Never imports the feeder."""
