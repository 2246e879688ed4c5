"""The feature cache: its HDF5 layout, writer and reader, placement in memory, inspection."""
