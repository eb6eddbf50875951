"""What must work before torch is imported: errors, signals, atomic files, seeds."""
