"""The reward models: what is shared by all users, and how one user's weights enter."""
