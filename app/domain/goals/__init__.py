"""Goals in bytes: what formats store, what a cache takes, and what is out of reach before anything is computed."""
