"""Measures this machine and says what it can be expected to do."""
