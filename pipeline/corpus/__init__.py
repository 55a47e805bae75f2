"""From sources to a token store: documents, near-duplicates, the tokenizer, the store."""
