"""Model types as llama.cpp has them: numbers, names, order of rows, and the tensors that it wants otherwise."""
