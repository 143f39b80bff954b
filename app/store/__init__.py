"""The only place with SQL, and the only place that writes a job's status.

Functions and repositories take a `Session` from `Database.transaction()` or `Database.reading()`; repositories also
take the tenant that they speak for and see nothing of any other.
"""
