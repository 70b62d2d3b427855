"""Everything that knows nothing of models: configuration, spans, metrics, prompts, rows, video decoding, logging."""
