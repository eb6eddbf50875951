"""A run on disk: checkpoints written atomically, read without executing anything, found, validated, locked."""
