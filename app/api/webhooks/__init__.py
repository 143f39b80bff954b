"""Webhooks: endpoints of a tenant and the log of their deliveries."""
