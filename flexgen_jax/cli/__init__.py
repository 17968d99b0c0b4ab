"""The command line: from words to calls."""
