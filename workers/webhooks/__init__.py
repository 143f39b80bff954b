"""Messages to tenants' receivers: signed, sent to addresses that were checked, tried again by a schedule."""
