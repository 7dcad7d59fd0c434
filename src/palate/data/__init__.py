"""From rows of choices to arrays: the data model, its readers, its splits and a generator with a planted truth."""
