"""Runs one block: what the operations of a schedule do to arrays, on this process's devices."""
