"""Webhooks: endpoints, and the messages that wait for them or went to them."""
