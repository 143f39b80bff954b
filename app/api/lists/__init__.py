"""Lists: jobs as pages of JSON, and filters by labels."""
