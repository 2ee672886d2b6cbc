"""Measurements. They print and never assert; what they said is kept in docs/log.md."""
