"""The networks that the model group offers."""
