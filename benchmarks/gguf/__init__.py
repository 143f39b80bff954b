"""GGUF files of the service beside those of llama.cpp's own quantizer: one text for both, and llama.cpp judges."""
