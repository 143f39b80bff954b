"""What a request costs its tenant: quotas, what is told of them, who did what, and what is written of it later."""
