"""Routes for operators: tenants, keys, the audit log, use; each needs a key with the scope `admin`."""
