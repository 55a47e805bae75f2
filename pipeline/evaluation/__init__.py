"""What came out: perplexity, speed, the report."""
