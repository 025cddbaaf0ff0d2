"""What one device does not need: `sharding` and `streaming`."""
