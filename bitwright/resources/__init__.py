"""The client as people use it: jobs, uploads and methods as resources of `Bitwright`, and its async twin."""
