"""What every command needs to run: devices, processes, checkpoints, logs, signals and files."""
