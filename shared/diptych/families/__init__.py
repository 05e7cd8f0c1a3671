"""Model families as data: what a config.json means, which tensors a checkpoint holds, and where each goes.

`family.py` is the entry: `read_model(config)` and the registry. One file per family; docs/families.md shows how to add
one.
"""
