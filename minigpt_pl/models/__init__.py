"""The networks, in plain torch: no Lightning, no files, no text."""
