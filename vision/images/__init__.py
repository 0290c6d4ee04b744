"""Files and bytes -> pixels."""
