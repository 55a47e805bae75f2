"""What a language model may look back at when it is tested: its own window, what it read before, a datastore."""
