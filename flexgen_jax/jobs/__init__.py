"""A file of requests in, a file of answers out, resumable at any point."""
