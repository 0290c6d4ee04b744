"""Pruners in serving engines that are not ours."""
