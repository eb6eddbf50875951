"""Lightning: the LightningModules, the optimizer, callbacks, loggers, and one fit from start to end."""
