"""Many models over the workers of a Ray cluster, one job."""
