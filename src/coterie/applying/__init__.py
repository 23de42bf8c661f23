"""Executing a plan: what it must not get wrong (`checks`), what becomes of each tensor (`outputs`), and doing it."""
