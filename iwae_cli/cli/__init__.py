"""The commands: iwae-train, iwae-eval, iwae-report."""
