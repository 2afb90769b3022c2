"""Where pygpt meets other code: the overrides of `pygpt.enable` (aten.py), sharding rules for DTensor (dtensor.py)."""
