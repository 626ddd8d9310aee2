"""Everything that knows of Lightning: callbacks, trainer, data, command line."""
