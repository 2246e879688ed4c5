"""The steps of bench/gpu.py: functions that take a Setting and yield Rows. They are listed in STEPS there."""
