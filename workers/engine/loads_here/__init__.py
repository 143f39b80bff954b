"""Whether the worker's runtimes load what the job makes: one block before it is made, and the files afterwards."""
