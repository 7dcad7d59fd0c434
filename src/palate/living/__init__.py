"""Profiles that live: what a user does, as it comes, becomes the same answer that one batch of it would have given."""
