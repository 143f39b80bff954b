"""Tenants: their keys, quotas, tokens and sessions, and the record of what they used and did."""
