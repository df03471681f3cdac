"""What a run will do and need, from a DeepSpeed config and a model's config: no engine, no weights, no GPU."""
