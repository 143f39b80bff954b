"""Models as llama.cpp knows them: its architectures, and what a configuration says that a GGUF file cannot."""
