"""Epochs to trials: the only room that asks, reports, prunes and tells."""
