"""The API under load, without workers: lists of a million jobs, reads, submissions and event streams."""
