"""Jobs as repositories of a Hub."""
