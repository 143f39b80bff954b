"""Addresses that webhooks may go to, and the kinds of messages."""
