"""Publishing of results to the Hub: a thread of the worker, and the child that it starts for each."""
