"""alignkit against TRL at its strongest: equal model, rows, batches and optimizer, steps in turn, one command."""
