"""The three stages, written once over the engine protocol."""
