"""Using a personal reward where text is produced: choosing among candidates, without touching the language model."""
