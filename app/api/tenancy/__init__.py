"""Costs of a request for its tenant: quotas and their headers, the audit log, late writes."""
