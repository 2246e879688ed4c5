"""Stage 1a: annotation files -> captions.jsonl and vocab.json."""
