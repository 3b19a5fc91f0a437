"""The embedded model: config, tokenizer and weights in Hugging Face format."""
