"""dsv4 inside other frameworks. Nothing is imported here: each integration needs its framework installed."""
