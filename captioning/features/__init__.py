"""The feature cache: its HDF5 layout, writing and reading, placement in memory, inspection."""
