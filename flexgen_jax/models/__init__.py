"""The models: pure functions, shapes and names of every family, and nothing about where things lie.

A family is one file and one line in :mod:`~flexgen_jax.models.registry`. Imports neither
``scheduling`` nor ``storage`` nor anything else of ``flexgen_jax``.
"""
