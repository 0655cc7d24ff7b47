"""Raw text to tokenizer to token shards to batches."""
