"""Finished jobs as repositories of a Hub, for clients with `HF_ENDPOINT=http://host/hub`."""
