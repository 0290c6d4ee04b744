"""The training loop, one step of it, what follows the last step; `zoo teach`."""
