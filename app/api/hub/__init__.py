"""Finished jobs as repositories of a Hub: what clients with `HF_ENDPOINT=http://host/hub` ask for."""
