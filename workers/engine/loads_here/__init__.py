"""Checks that the worker's runtimes load what the job makes: one block before it is made, the files afterwards."""
