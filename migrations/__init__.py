"""Alembic's environment and the schema's versions; run by `app.store.session.migrate`."""
