"""Reads GGUF files, llama.cpp's format, as if they were Hugging Face folders."""
