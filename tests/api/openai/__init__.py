"""Tests of the interface for OpenAI's clients."""
