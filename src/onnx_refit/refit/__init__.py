"""The refit transaction: stage, check, derive, canary, commit, rollback."""
