"""Methods that read text: judges behind any OpenAI-compatible endpoint, what they make of a user, and their account of cost."""
