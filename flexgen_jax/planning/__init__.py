"""How a job is cut, placed and predicted before it runs: blocks, cells, stages, sizes, policies.

Opens no store and computes nothing on a device.
"""
