"""Tokenizers as llama.cpp has them: vocabularies of several kinds, special tokens, the tokens around a text."""
