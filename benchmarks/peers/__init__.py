"""The tools that people would take instead, a driver each; ``compare_peers.py`` runs them."""
