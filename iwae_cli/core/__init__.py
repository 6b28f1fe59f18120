"""What everything stands on: numerics, keyed noise, interfaces, devices, files, signals, errors, progress."""
