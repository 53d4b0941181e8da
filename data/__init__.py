"""Scripts that make folders of token shards. The trainer reads the shards only; data/shards.py says what such a folder holds."""
