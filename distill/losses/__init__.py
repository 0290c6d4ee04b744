"""Divergences, relations and preference losses."""
