"""Trials to answers: final models, reports, the dashboard."""
