"""What must work before torch is imported: errors, ranges of options, signals, atomic files, seeds."""
