"""Webhooks against a receiver that fails, is slow, redirects, and is gone."""
