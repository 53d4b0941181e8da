"""
Scripts that make folders of token shards, `python -m data.NAME`. The trainer reads the shards only; data/shards.py says
what such a folder holds.
"""
