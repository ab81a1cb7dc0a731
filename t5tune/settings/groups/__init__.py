"""Groups of settings that several commands share."""
