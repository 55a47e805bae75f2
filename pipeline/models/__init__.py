"""One transformer, its position schemes and heads, and its way in and out of Hugging Face."""
