"""Chaos: a whole service of several tenants under faults that a seed draws, and what must hold afterwards."""
