"""Webhooks, as types that the API and the client share."""
