"""Use: what runs inside a user's own training."""
