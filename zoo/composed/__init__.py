"""The composed model: its parts put together, forward, generate, what trains, what it gives."""
