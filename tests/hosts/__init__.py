"""Several hosts: network namespaces of this machine that share a database, a broker and a bucket alone."""
