"""GGUF files for llama.cpp, to be measured beside our stores: of random weights, or of a Mixtral checkpoint."""
