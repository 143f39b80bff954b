"""Weights in the block types of llama.cpp: their levels, and the search of factors and offsets."""
