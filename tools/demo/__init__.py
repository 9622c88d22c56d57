"""What `make demo` shows: a quantized Mixtral, held by expertd, generates text."""
