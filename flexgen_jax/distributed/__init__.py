"""Several processes, one pipeline: who they are, what they hand over, and what if one is lost."""
