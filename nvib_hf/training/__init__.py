"""The Trainer with the terms of the loss in its logs, the callbacks that weigh them, the search for taus."""
