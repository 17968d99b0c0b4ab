"""Parameters on disk: what is read, converted into a weight store, opened and exported again."""
